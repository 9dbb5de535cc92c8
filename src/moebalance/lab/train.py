"""One training run: a Transformers MoE model, the Trainer, one method, one log.

The model has fresh weights, or those of a checkpoint to fine-tune. The seed fixes fresh weights and
the data order, whatever the method, so runs of different methods with one seed are paired.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from transformers import PreTrainedModel

from moebalance import Balancing, attach
from moebalance.integrations.huggingface.sharded import sharding_for_accelerate
from moebalance.lab.damage import step_of
from moebalance.lab.finetune import save_final, start
from moebalance.lab.identity import identify, log_longer, recipe_method
from moebalance.lab.inputs import build_model, load_texts
from moebalance.lab.interrupt import interrupt_between_steps
from moebalance.lab.journal import header
from moebalance.lab.lock import alone_in
from moebalance.lab.recipe import Recipe
from moebalance.lab.resume import Start, find_start
from moebalance.lab.trainer import make_trainer
from moebalance.methods import Method
from moebalance.runlog import LOG_NAME, RunLog


def train_run(
    recipe: Recipe,
    *,
    method: str,
    seed: int,
    batching: str,
    folder: Path,
    resume: bool = False,
    save_model: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """Train one model and write its run log.

    Args:
        recipe: what to train on what.
        method: words of the method; its options come from the recipe.
        seed: seed of fresh weights and data order.
        batching: `"mixed"`, `"one-domain"` or `"shift"`.
        folder: where the log, the checkpoints and the model go.
        resume: go on from the last whole checkpoint in `folder`, if there is one. The recipe may
            give more steps than before; the learning rate then follows the longer schedule.
        save_model: save the model in `folder/final` at the end; it is detached then.
        cache_dir: where tokenised text is kept between runs.

    Returns:
        The path of the run log.

    Raises:
        FileNotFoundError, ValueError: the recipe cannot be run, or the folder holds another run, or
            another process is at work there.
        OSError: the disk is full; names the file.
    """
    rank, world = _rank_and_world()
    with ExitStack() as stack:
        if rank == 0:
            stack.enter_context(alone_in(folder))
        if stack.enter_context(sharding_for_accelerate()):
            recipe = replace(recipe, train=replace(recipe.train, sharded=True))
        if recipe.train.sharded and recipe.lora is not None:
            raise ValueError(
                "[train] sharded (or accelerate's FSDP) splits a model's own weights, of which "
                "[lora] trains few or none: leave one of them out."
            )
        identity = identify(recipe, method, seed, batching)
        begun = find_start(recipe, identity, folder, resume=resume, save_model=save_model)
        if begun.nothing_left:
            return folder / LOG_NAME
        recipe = begun.recipe
        texts = load_texts(recipe, cache_dir=cache_dir)
        transformers.set_seed(seed)
        made, vocab_size = recipe_method(recipe, method), texts.data.tokenizer.vocab_size
        model, balancing = _balanced_model(recipe, made, vocab_size, begun.checkpoint)
        if recipe.train.gradient_ratio:
            balancing.weigh_gradient()
        log, goes_on = _open_log(folder, begun, rank, stack)
        if not goes_on:
            log.write("header", **header(recipe, identity, model, balancing, texts))
        trainer = make_trainer(recipe, identity, model, balancing, texts, log, folder, world)
        checkpoint = begun.checkpoint
        if checkpoint is not None and recipe.lora is None and not recipe.train.sharded:
            stack.enter_context(_without_word_of_missing_keys())
        with interrupt_between_steps(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if save_model and (rank == 0 or recipe.train.sharded):
            save_final(model, balancing, texts.data.tokenizer, folder, writes=rank == 0)
    return folder / LOG_NAME


def _balanced_model(
    recipe: Recipe, method: Method, vocab_size: int, checkpoint: Path | None
) -> tuple[PreTrainedModel, Balancing]:
    # A distributed checkpoint is read by all ranks together, into their parts of the model.
    weights = None if recipe.train.sharded else checkpoint
    if recipe.checkpoint is not None:
        return start(recipe, method, vocab_size, weights)
    model = build_model(recipe, vocab_size, weights)
    return model, attach(model, method)


def _open_log(folder: Path, begun: Start, rank: int, stack: ExitStack) -> tuple[RunLog, bool]:
    """The log, closed with the stack, and whether it has its header."""
    path, goes_on = folder / LOG_NAME, begun.checkpoint is not None and rank == 0
    folder.mkdir(parents=True, exist_ok=True)
    if rank > 0:
        # Every rank evaluates, as a sharded model needs all of them; rank 0 writes it down.
        log = RunLog(Path(stack.enter_context(TemporaryDirectory())))
    elif begun.checkpoint is not None:
        if begun.longer:
            log_longer(path, begun.recipe)
        log = RunLog.resume(path, step_of(begun.checkpoint))
    else:
        path.unlink(missing_ok=True)
        log = RunLog(path)
    return stack.enter_context(log), goes_on


@contextmanager
def _without_word_of_missing_keys() -> Iterator[None]:
    """Keep the Trainer from reporting missing keys where all weights have been loaded already.

    It leaves out experts that Transformers saves under other names than the model has.
    """
    trainer = logging.getLogger("transformers.trainer")

    def is_news(record: logging.LogRecord) -> bool:
        return "keys in the checkpoint model loaded" not in record.getMessage()

    trainer.addFilter(is_news)
    try:
        yield
    finally:
        trainer.removeFilter(is_news)


def _rank_and_world() -> tuple[int, int]:
    """As torchrun and accelerate say it, before there is a process group."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
