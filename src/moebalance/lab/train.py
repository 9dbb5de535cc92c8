"""One training run: a Transformers MoE model, HF Trainer, one method, one log.

The model has fresh weights, or those of a checkpoint to fine-tune. The seed fixes fresh weights and
the data order, whatever the method; so runs of different methods with one seed are paired.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainingArguments

from moebalance.attachment import attach
from moebalance.core.handle import Balancing
from moebalance.integrations.huggingface import BalanceCallback
from moebalance.integrations.huggingface.sharded import (
    ShardedTrainer,
    is_distributed,
    shard,
    sharding_for_accelerate,
)
from moebalance.lab.checkpoints import (
    checkpoint_folder,
    fingerprint,
    last_whole_checkpoint,
    step_of,
)
from moebalance.lab.finetune import save_final, start
from moebalance.lab.inputs import Texts, build_model, load_texts
from moebalance.lab.interrupt import interrupt_between_steps
from moebalance.lab.journal import Identity, Journal, header, refuse_other_run
from moebalance.lab.recipe import FINAL, Recipe, TrainSpec, refuse_frozen
from moebalance.lab.text.batches import TokenDataset, ordered_indices
from moebalance.lab.text.data import TextData
from moebalance.runlog import LOG_NAME, RunLog
from moebalance.words.methods import build_method, without_options

_EVAL_SEED = 20260523  # of the held-out sequences: the same for every run


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
        method: the method's word; its options come from the recipe.
        seed: of fresh weights and data order.
        batching: `"mixed"`, `"one-domain"` or `"shift"`.
        folder: where the log, the checkpoints and the model go.
        resume: go on from the last whole checkpoint in `folder`, if there is one.
        save_model: save the model that training ends with in `folder/final`; it is detached then.
        cache_dir: where tokenised text is kept between runs.

    Returns:
        The path of the run log.
    """
    with ExitStack() as stack:
        if stack.enter_context(sharding_for_accelerate()):
            recipe = replace(recipe, train=replace(recipe.train, sharded=True))
        if recipe.train.sharded and recipe.lora is not None:
            raise ValueError(
                "[train] sharded (or accelerate's FSDP) splits a model's own weights, of which "
                "[lora] trains few or none: leave one of them out."
            )
        word, made = without_options(method), build_method(method, dict(recipe.methods))
        refuse_frozen(made, recipe.lora)
        origin = None
        if recipe.checkpoint is not None:
            origin = fingerprint(checkpoint_folder(recipe.checkpoint))
        which = Identity(word, repr(made), seed, batching, origin)
        rank, world = _rank_and_world()
        path = folder / LOG_NAME
        resumed = last_whole_checkpoint(folder) if resume else None
        if resumed is not None:
            refuse_other_run(path, recipe, which)
            recipe = _go_on_as_saved(recipe, resumed)
        else:
            _refuse_earlier_run(folder, resume=resume, save_model=save_model)
        texts = load_texts(recipe, cache_dir=cache_dir)
        vocab_size = texts.data.tokenizer.vocab_size
        transformers.set_seed(seed)
        # A distributed checkpoint is read by all ranks together, into their parts of the model.
        weights = None if recipe.train.sharded else resumed
        if recipe.checkpoint is None:
            model = build_model(recipe, vocab_size, weights)
            balancing = attach(model, made)
        else:
            model, balancing = start(recipe, made, vocab_size, weights)
        folder.mkdir(parents=True, exist_ok=True)
        if rank > 0:
            # Every rank evaluates, as a sharded model needs all of them; one writes it down.
            aside = stack.enter_context(TemporaryDirectory())
            log, resumed_log = RunLog(Path(aside)), False
        else:
            resumed_log = resumed is not None
            if not resumed_log:
                path.unlink(missing_ok=True)
            log = RunLog.resume(path, step_of(resumed)) if resumed is not None else RunLog(path)
        stack.enter_context(log)
        if not resumed_log:
            log.write("header", **header(recipe, which, model, balancing, texts))
        spec = share_out(recipe.train, world)
        trainer = _trainer(recipe, spec, model, balancing, texts, log, seed, batching, folder)
        with interrupt_between_steps(trainer):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        if save_model and (rank == 0 or recipe.train.sharded):
            save_final(model, balancing, texts.data.tokenizer, folder, writes=rank == 0)
    return path


def share_out(spec: TrainSpec, world: int) -> TrainSpec:
    """The part of a step that one of `world` processes takes; the step as a whole stays the same.

    Raises:
        ValueError: a step's sequences cannot be shared out equally.

    >>> share_out(TrainSpec(batch_size=8, accumulation=4), 2).accumulation
    2
    """
    if spec.accumulation % world == 0:
        return replace(spec, accumulation=spec.accumulation // world)
    if spec.batch_size * spec.accumulation % world == 0 and spec.accumulation == 1:
        return replace(spec, batch_size=spec.batch_size // world)
    raise ValueError(
        f"[train] accumulation={spec.accumulation}, batch_size={spec.batch_size} on {world} "
        f"processes: make accumulation a multiple of {world}, or 1 with such a batch_size."
    )


def _rank_and_world() -> tuple[int, int]:
    """As torchrun and accelerate say it, before there is a process group."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _go_on_as_saved(recipe: Recipe, resumed: Path) -> Recipe:
    """The recipe, sharded if its checkpoint is one of a sharded run: that can be taken up.

    Raises:
        ValueError: the recipe is sharded and its checkpoint is of a run that was not.
    """
    if is_distributed(resumed):
        return replace(recipe, train=replace(recipe.train, sharded=True))
    if recipe.train.sharded:
        raise ValueError(
            f"{resumed} was saved by a run on whole copies of the model: go on with it without "
            "[train] sharded (or accelerate's FSDP), on any number of processes."
        )
    return recipe


def _refuse_earlier_run(folder: Path, *, resume: bool, save_model: bool) -> None:
    """Refuse to write over what an earlier run left: its checkpoints, or its model."""
    left = [] if resume else sorted(folder.glob("checkpoint-*"))
    if left:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: go on with it (--resume), choose "
            "another folder (--out), or remove them."
        )
    if save_model and (folder / FINAL).exists():
        raise ValueError(
            f"{folder / FINAL} is the model of an earlier run: choose another folder (--out), or "
            "remove it."
        )


def _trainer(
    recipe: Recipe,
    spec: TrainSpec,
    model: PreTrainedModel,
    balancing: Balancing,
    texts: Texts,
    log: RunLog,
    seed: int,
    batching: str,
    folder: Path,
) -> Trainer:
    whole, data = recipe.train, texts.data
    order = ordered_indices(
        data.train.domains,
        batch_size=whole.batch_size,
        num_batches=whole.steps * whole.accumulation,
        batching=batching,
        seed=seed,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=round(spec.warmup * spec.steps),
        weight_decay=spec.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=spec.max_grad_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if spec.save_every else "no",
        save_steps=spec.save_every or 500,
        save_total_limit=2,
        save_only_model=spec.sharded,  # the rest is saved by ShardedTrainer
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        bf16=spec.bf16,
        **(_checkpointing() if spec.gradient_checkpointing else {}),
    )
    new = held_out(data, spec.eval_sequences)
    old = None if texts.old is None else held_out(texts.old, spec.eval_sequences)
    kind: Callable[..., Trainer] = Trainer
    if spec.sharded:
        shard(model)
        kind = partial(ShardedTrainer, balancing=balancing)
    trainer = kind(
        model,
        arguments,
        train_dataset=data.train.in_order(order),
        data_collator=_collate,
        callbacks=[
            BalanceCallback(balancing, state_file=not spec.sharded),
            Journal(log, recipe, balancing, new, old),
        ],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _checkpointing() -> dict[str, Any]:
    """Arguments for computing activations twice, under the name that this Transformers has."""
    names = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def held_out(data: TextData, sequences: int) -> TokenDataset:
    """The held-out sequences to evaluate on: the same for every run."""
    order = ordered_indices(
        data.validation.domains, batch_size=1, num_batches=sequences, seed=_EVAL_SEED
    )
    return data.validation.in_order(order)


def _collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "labels": ids}
