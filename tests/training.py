"""What tests of trainers share: data, settings, and a balancing term whose gradient is known."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import moebalance as mb
from families import tiny, tokens

BalanceCallback = mb.huggingface.BalanceCallback

QUIET = {
    "max_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_grad_norm": 0,
    "dataloader_pin_memory": False,
}
"""Settings for any trainer, TRL's among them."""


class Rows(Dataset):
    """Sequences of one length, or of the lengths given."""

    def __init__(self, count: int, lengths: Sequence[int] = ()) -> None:
        lengths = list(lengths) or [12] * count
        ids = tokens(count, max(lengths), seed=3)
        self.rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[item], "labels": self.rows[item]}


def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of rows of several lengths, padded on the right."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([row["input_ids"] for row in rows], batch_first=True)
    mask = pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    labels = pad([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class FixedPrice(mb.Method):
    """Charge the same price whatever happens: its gradient is additive over any split."""

    strength: float

    def loss_price(self, state: Any, batch: mb.routing.Batch) -> Tensor:
        return self.strength * torch.linspace(-1, 1, batch.routing.num_experts)


class KeepGradient(TrainerCallback):
    """Router gradient as the optimizer is about to see it, a gradient scaler's factor taken out."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    @property
    def gradient(self) -> Tensor:
        return self.gradients[-1]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scaler = kwargs["optimizer"].scaler
        found = router_gradient(kwargs["model"]).clone()
        self.gradients.append(found if scaler is None else found / scaler.get_scale())


def router_gradient(model: nn.Module) -> Tensor:
    """Gradient of what is trained of the first router, end to end."""
    return torch.cat(
        [
            parameter.grad.reshape(-1)
            for name, parameter in model.named_parameters()
            if ".0.mlp.gate." in name and parameter.grad is not None
        ]
    )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        **QUIET,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def plain(
    folder: Path, data: Dataset, *, kind: Callable[..., Trainer] = Trainer, **changes: Any
) -> Callable[..., Trainer]:
    """A maker of plain Trainers, for `term_gradients`."""

    def make(model: PreTrainedModel, callbacks: list[Any], **settings: Any) -> Trainer:
        return kind(
            model,
            arguments(folder, **{**changes, **settings}),
            train_dataset=data,
            data_collator=padded,
            callbacks=callbacks,
        )

    return make


def term_gradients(
    make: Callable[..., Trainer],
    *,
    model: Callable[[], nn.Module] = lambda: tiny("mixtral"),
    **settings: Any,
) -> list[Tensor]:
    """Router gradient of each step with a balancing term, less the one without."""
    found = []
    for strength in (1.0, 0.0):
        keep = KeepGradient()
        make(model(), [BalanceCallback(FixedPrice(strength)), keep], **settings).train()
        found.append(keep.gradients)
    return [with_term - without for with_term, without in zip(*found, strict=True)]


def compiled_and_eager(
    make: Callable[..., Trainer], compiling: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """A step's term compiled and eager; only one of the runs is compiled, which takes long."""
    found = []
    for strength, settings in ((1.0, compiling), (1.0, {}), (0.0, {})):
        keep = KeepGradient()
        model = tiny("mixtral", num_hidden_layers=1)
        make(model, [BalanceCallback(FixedPrice(strength)), keep], **settings).train()
        found.append(keep.gradient)
    compiled, eager, without = found
    return compiled - without, eager - without


def agree(split: Tensor, whole: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether two gradients are the same up to a share of their size."""
    return bool(whole.norm() > 0 and (split - whole).norm() <= tolerance * whole.norm())


def scaled(trainer: type[Trainer]) -> type[Trainer]:
    """The same trainer under a gradient scaler, which accelerate makes on CUDA only."""

    class Scaled(trainer):  # type: ignore[misc, valid-type]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)

    return Scaled


@contextmanager
def light_collections() -> Iterator[None]:
    """Spare the garbage collector what is imported: every trainer collects when it starts."""
    gc.collect()
    gc.freeze()
    yield
