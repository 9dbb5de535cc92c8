"""The Trainer of a run: its arguments, the order of its text, and who writes the log."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from moebalance import Balancing
from moebalance.files import writing
from moebalance.integrations.huggingface import BalanceCallback
from moebalance.integrations.huggingface.sharded import ShardedTrainer, shard
from moebalance.lab.identity import Identity
from moebalance.lab.inputs import Texts
from moebalance.lab.journal import OLD, SEEN, Journal
from moebalance.lab.recipe import Recipe, TrainSpec
from moebalance.lab.text.batches import TokenDataset, ordered_indices
from moebalance.lab.text.data import TextData
from moebalance.runlog import RunLog

_EVAL_SEED = 20260523  # of the sequences to evaluate on: the same for every run


def make_trainer(
    recipe: Recipe,
    identity: Identity,
    model: PreTrainedModel,
    balancing: Balancing,
    texts: Texts,
    log: RunLog,
    folder: Path,
    world: int,
) -> Trainer:
    """A Trainer that balances, reads the text in the order of its seed, and writes the log.

    Args:
        recipe: how to train.
        identity: seed and batching.
        model: the model, with `balancing` attached; sharded here if the recipe says so.
        balancing: the handle of the model.
        texts: the text to train on, and the old text if there is one.
        log: the log to write.
        folder: where checkpoints go.
        world: processes that share a step.

    Raises:
        ValueError: a step cannot be shared out equally.
    """
    spec = share_out(recipe.train, world)
    new = sample(texts.data.validation, spec.eval_sequences)
    also = {SEEN: sample(texts.data.train, spec.eval_sequences)}
    if texts.old is not None:
        also[OLD] = sample(texts.old.validation, spec.eval_sequences)
    kind: Callable[..., Trainer] = _NamesWhatItWrites
    if spec.sharded:
        shard(model)
        kind = partial(_ShardedTrainer, balancing=balancing)
    trainer = kind(
        model,
        _arguments(spec, identity.seed, folder),
        train_dataset=_training_order(recipe.train, identity, texts.data),
        data_collator=_collate,
        callbacks=[
            # The log has loads, of which trackers make all else.
            BalanceCallback(balancing, show=(), state_file=not spec.sharded),
            Journal(log, recipe, balancing, new, also),
            _FollowSchedule(),
        ],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class _NamesWhatItWrites(Trainer):
    """If a checkpoint cannot be written, the error names it and the cause."""

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        step = self.state.global_step
        with writing(Path(str(self.args.output_dir)) / f"checkpoint-{step}"):
            super()._save_checkpoint(*args, **options)

    def _load_scaler(self, checkpoint: str | None) -> None:
        # A file of this name may lie there, but only a run in float16 has what to load it into.
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)


class _ShardedTrainer(_NamesWhatItWrites, ShardedTrainer):
    """The same for distributed checkpoints."""


class _FollowSchedule(TrainerCallback):
    """Starts a resumed run at the learning rate of its schedule.

    The optimizer was saved with the rate of the schedule then, which may have been shorter.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            schedule = kwargs["lr_scheduler"]
            schedule.last_epoch -= 1
            schedule.step()


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


def sample(part: TokenDataset, sequences: int) -> TokenDataset:
    """The sequences of this text to evaluate on: the same for every run."""
    order = ordered_indices(part.domains, batch_size=1, num_batches=sequences, seed=_EVAL_SEED)
    return part.in_order(order)


def _training_order(whole: TrainSpec, identity: Identity, data: TextData) -> TokenDataset:
    order = ordered_indices(
        data.train.domains,
        batch_size=whole.batch_size,
        num_batches=whole.steps * whole.accumulation,
        batching=identity.batching,
        seed=identity.seed,
    )
    return data.train.in_order(order)


def _arguments(spec: TrainSpec, seed: int, folder: Path) -> TrainingArguments:
    return TrainingArguments(
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


def _checkpointing() -> dict[str, Any]:
    # Transformers renamed the argument.
    names = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "labels": ids}
