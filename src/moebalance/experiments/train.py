"""One training run: a Transformers MoE model from a configuration, HF Trainer, one method, one log.

The seed fixes the initial weights and the data order, whatever the method; so runs of different
methods with one seed are paired.
"""

import json
import logging
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from moebalance import __version__
from moebalance.attachment import attach
from moebalance.balancers import Balancer
from moebalance.balancing import Balancing
from moebalance.experiments.batches import TokenDataset, ordered_indices
from moebalance.experiments.checkpoints import last_whole_checkpoint, step_of
from moebalance.experiments.corpus import did_you_mean
from moebalance.experiments.data import TextData, load_data
from moebalance.experiments.evaluate import evaluate, fractions
from moebalance.experiments.methods import build_method, without_options
from moebalance.experiments.recipe import Recipe
from moebalance.integrations.huggingface import BalanceCallback
from moebalance.runlog import LOG_NAME, RunLog, read_run

logger = logging.getLogger(__name__)

_EVAL_SEED = 20260523  # of the held-out sequences: the same for every run


def train_run(
    recipe: Recipe,
    *,
    method: str,
    seed: int,
    batching: str,
    folder: Path,
    resume: bool = False,
    cache_dir: Path | None = None,
) -> Path:
    """Train one model and write its run log.

    Args:
        recipe: what to train on what.
        method: the method's word; its options come from the recipe.
        seed: of weights and data order.
        batching: `"mixed"` or `"one-domain"`.
        folder: where the log and the checkpoints go.
        resume: go on from the last whole checkpoint in `folder`, if there is one.
        cache_dir: where tokenised text is kept between runs.

    Returns:
        The path of the run log.
    """
    options = dict(recipe.methods)
    balancer = build_method(method, options)
    data = load_data(recipe.data, cache_dir=cache_dir)
    transformers.set_seed(seed)
    checkpoint = last_whole_checkpoint(folder) if resume else None
    model = build_model(recipe, data.tokenizer.vocab_size, checkpoint)
    balancing = attach(model, balancer)
    path = folder / LOG_NAME
    step = 0 if checkpoint is None else step_of(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None:
        _refuse_other_run(path, recipe, without_options(method), repr(balancer), seed, batching)
    elif not resume and any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: go on with it (--resume), choose "
            "another folder (--out), or remove them."
        )
    else:
        path.unlink(missing_ok=True)
    log = RunLog(path) if checkpoint is None else RunLog.resume(path, step)
    with log:
        if checkpoint is None:
            word = without_options(method)
            header = _header(recipe, word, balancer, seed, batching, data, model, balancing)
            log.write("header", **header)
        trainer = _trainer(recipe, model, balancing, data, log, seed, batching, folder)
        with _interrupt_between_steps(trainer):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return path


def build_model(recipe: Recipe, vocab_size: int, checkpoint: Path | None = None) -> PreTrainedModel:
    """Make the recipe's model, with fresh weights or those of a checkpoint.

    The weights are loaded here because a Trainer that resumes leaves out experts which Transformers
    saves under other names than it holds them: it logs "missing keys" and goes on without them.

    Raises:
        ValueError: unknown architecture or configuration key, with the nearest valid name.
    """
    keys = dict(recipe.model)
    architecture = keys.pop("architecture")
    experts = keys.pop("experts_implementation", None)
    possible = _architectures()
    if architecture not in possible:
        raise ValueError(
            f"[model] architecture={architecture!r}.{did_you_mean(architecture, possible)} It must "
            "be a causal language model of the installed Transformers, such as qwen3_moe."
        )
    default = AutoConfig.for_model(architecture)
    fields = getattr(type(default), "__dataclass_fields__", {})
    known = sorted({*default.to_dict(), *default.attribute_map, *fields})
    for key in keys:
        if key not in known:
            raise ValueError(
                f"[model] {architecture} has no configuration key {key!r}."
                f"{did_you_mean(key, known)}"
            )
    config = AutoConfig.for_model(architecture, vocab_size=vocab_size, **keys)
    model: PreTrainedModel
    if checkpoint is None:
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


class _Journal(TrainerCallback):
    """Writes the run log: a row a step, load snapshots, evaluations."""

    def __init__(
        self, log: RunLog, recipe: Recipe, balancing: Balancing, held_out: TokenDataset
    ) -> None:
        self.log, self.spec = log, recipe.train
        self.balancing, self.held_out = balancing, held_out
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_time_s = time.perf_counter() - self.started

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        step = state.global_step
        own = {k.removeprefix("moe/"): v for k, v in logs.items() if k.startswith("moe/")}
        self.log.write(
            "step",
            step=step,
            loss=logs["loss"],
            lr=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            step_time_s=self.step_time_s,
            **own,
        )
        if step % self.spec.snapshot_every == 0 or step == args.max_steps:
            loads = self.balancing.loads().values()
            hard, soft = (torch.stack(load) for load in zip(*loads, strict=True))
            self.log.write("snapshot", step=step, load=fractions(hard), soft=fractions(soft))
        every = self.spec.eval_every
        if step == args.max_steps or (every and step % every == 0):
            found = evaluate(
                kwargs["model"], self.balancing, self.held_out, batch_size=self.spec.batch_size
            )
            self.log.write("eval", step=step, **found)


class _StopHere(TrainerCallback):
    """Raises the interrupt that came during a step, once the step is whole."""

    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def _interrupt_between_steps(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C end the run after the step in progress; a second one ends it at once.

    Raised anywhere else, Python may drop it: what falls into a finaliser is printed and forgotten.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return
    stop = _StopHere()
    trainer.add_callback(stop)
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    balancing: Balancing,
    data: TextData,
    log: RunLog,
    seed: int,
    batching: str,
    folder: Path,
) -> Trainer:
    spec = recipe.train
    order = ordered_indices(
        data.train.domains,
        batch_size=spec.batch_size,
        num_batches=spec.steps * spec.accumulation,
        batching=batching,
        seed=seed,
    )
    held_out = data.validation.in_order(
        ordered_indices(
            data.validation.domains,
            batch_size=1,
            num_batches=spec.eval_sequences,
            seed=_EVAL_SEED,
        )
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
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    callbacks = [BalanceCallback(balancing), _Journal(log, recipe, balancing, held_out)]
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data.train.in_order(order),
        data_collator=_collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "labels": ids}


def _header(
    recipe: Recipe,
    method: str,
    balancer: Balancer,
    seed: int,
    batching: str,
    data: TextData,
    model: PreTrainedModel,
    balancing: Balancing,
) -> dict[str, Any]:
    layer = next(iter(balancing.layers.values()))
    top_k = cast(int, model.get_submodule(layer.name).top_k)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return {
        "format": 1,
        "name": recipe.name,
        "method": method,
        "balancer": repr(balancer),
        "seed": seed,
        "batching": batching,
        "steps": recipe.train.steps,
        "recipe": recipe.as_dict(),
        "versions": {
            "moebalance": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "data": data.header(),
        "model": {
            "architecture": recipe.model["architecture"],
            "parameters": total,
            "active_parameters": total - round(experts * (1 - top_k / layer.num_experts)),
            "num_experts": layer.num_experts,
            "top_k": top_k,
            "layers": list(balancing.layers),
        },
    }


def _commit() -> str | None:
    """Commit of this library's source tree, where it runs from one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _refuse_other_run(
    path: Path, recipe: Recipe, method: str, balancer: str, seed: int, batching: str
) -> None:
    """Refuse to go on with a run that was started as another one."""
    header = read_run(path).header
    now = {"method": method, "balancer": balancer, "seed": seed, "batching": batching}
    now["recipe"] = json.loads(json.dumps(recipe.as_dict()))
    for key, value in now.items():
        if header.get(key) != value:
            raise ValueError(
                f"{path} is of a run with another {key}: {header.get(key)!r}, not {value!r}. "
                "Resume with what it was started with, or choose another folder."
            )


def _architectures() -> list[str]:
    return sorted(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
