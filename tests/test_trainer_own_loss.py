"""Trainers whose loss is not the model's alone: the balancing term keeps its strength."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

import moebalance as mb
from families import tiny
from moebalance.integrations.huggingface.trainer_loss import scaler_factor
from test_trl import PLAIN, tokenizer, words
from training import (
    BalanceCallback,
    FixedPrice,
    Rows,
    agree,
    light_collections,
    plain,
    scaled,
    term_gradients,
)


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


def from_logits(outputs: Any) -> Tensor:
    """Stands for a distillation loss, the mean of a micro-batch."""
    return outputs["logits"].float().square().mean()


class Added(Trainer):
    """Adds a term to the model's loss, which knows the labels of the step."""

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        return self.combine(loss, from_logits(outputs))

    def combine(self, loss: Tensor, own: Tensor) -> Tensor:
        return loss + own


class Divided(Added):
    """Has the Trainer divide the sum by the micro-batches."""

    loss_is_scaled_for_ga = False


class Instead(Added):
    """Leaves the model's loss out, and divides by itself."""

    def combine(self, loss: Tensor, own: Tensor) -> Tensor:
        return own / self.args.gradient_accumulation_steps


class InsteadDivided(Instead):
    """Leaves the model's loss out, and has the Trainer divide."""

    loss_is_scaled_for_ga = False


class Ignores(Trainer):
    """Returns the mean of a micro-batch; the Trainer takes it for a part of the step's."""

    parts = 1

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        outputs = model(**inputs)
        loss = self.loss_of(outputs) / self.parts
        return (loss, outputs) if return_outputs else loss

    def loss_of(self, outputs: Any) -> Tensor:
        return outputs["loss"]


class IgnoresDivided(Ignores):
    """Has the Trainer divide."""

    loss_is_scaled_for_ga = False


class IgnoresDividesItself(Ignores):
    """Divides by itself."""

    @property
    def parts(self) -> int:  # type: ignore[override]
        return self.args.gradient_accumulation_steps


class IgnoresLabels(Ignores):
    """Makes the mean by itself."""

    def loss_of(self, outputs: Any) -> Tensor:
        return from_logits(outputs)


def term(folder: Path, kind: Any, split: int) -> Tensor:
    make = plain(folder, Rows(8), kind=kind)
    sizes = {"per_device_train_batch_size": 8 // split, "gradient_accumulation_steps": split}
    (found,) = term_gradients(make, **sizes)
    return found


@pytest.mark.parametrize("kind", [Ignores, IgnoresDivided, IgnoresDividesItself, IgnoresLabels])
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "scaler"])
@pytest.mark.situation(
    "Loss",
    "`compute_loss` ignores `num_items_in_batch`, and its loss is a mean of the micro-batch",
    "works: the term is the same at 1 and 4 micro-batches, however often the loss is divided",
)
def test_strength_is_the_same_where_a_trainer_ignores_the_labels_of_the_step(
    tmp_path: Path, kind: Any, scaler: bool
) -> None:
    kind = scaled(kind) if scaler else kind
    assert agree(term(tmp_path, kind, 4), term(tmp_path, kind, 1))


@pytest.mark.parametrize("kind", [Ignores, IgnoresDivided, IgnoresDividesItself])
@pytest.mark.situation(
    "Loss",
    "The Trainer adds up the means of micro-batches, so that its loss is A times a mean",
    "warned: once; the term stays a mean",
)
def test_a_loss_that_nobody_divides_is_told_of_once(
    tmp_path: Path, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make = plain(tmp_path, Rows(8), kind=kind, max_steps=2, gradient_accumulation_steps=2)
    make(tiny("mixtral"), [BalanceCallback(FixedPrice(1.0))]).train()
    told = caplog.text.count("adds up the mean losses of 2 micro-batches")
    assert told == (1 if kind is Ignores else 0)


@pytest.mark.parametrize("split", [4, 8])
@pytest.mark.parametrize("kind", [Added, Divided, Instead, InsteadDivided])
@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "scaler"])
@pytest.mark.situation(
    "Loss",
    "`compute_loss` adds a term of its own to the model's loss, or replaces it",
    "works: the term is the same at 1, 4 and 8 micro-batches",
)
def test_strength_is_the_same_however_a_trainer_makes_its_loss_of_the_models(
    tmp_path: Path, kind: Any, split: int, scaler: bool
) -> None:
    make = plain(tmp_path, Rows(8), kind=scaled(kind) if scaler else kind)
    (whole,) = term_gradients(make, per_device_train_batch_size=8)
    sizes = {"per_device_train_batch_size": 8 // split, "gradient_accumulation_steps": split}
    (parts,) = term_gradients(make, **sizes)
    assert agree(parts, whole)


@pytest.mark.situation(
    "Loss",
    "An epoch whose last step has fewer micro-batches, with a loss of the trainer's own",
    "works",
)
def test_a_short_last_step_keeps_its_strength_with_a_loss_of_the_trainers(tmp_path: Path) -> None:
    """Six rows by fours, one at a time: the second step has two micro-batches."""
    make = plain(tmp_path, Rows(6), kind=Instead, learning_rate=0.0)
    pair = term_gradients(make, per_device_train_batch_size=2, max_steps=3)
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    first, last = term_gradients(make, max_steps=2, **sizes)
    assert agree(first, (pair[0] + pair[1]) / 2)
    assert agree(last, pair[2])


def test_after_a_trainer_a_loop_of_ones_own_has_the_scale_of_its_own(tmp_path: Path) -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.PhiBalancing())
    make = plain(tmp_path, Rows(8), gradient_accumulation_steps=4)
    make(model, [BalanceCallback(balancing)], per_device_train_batch_size=2).train()
    assert {float(layer.loss_scale) for layer in balancing.layers.values()} == {1.0}


@pytest.mark.parametrize("scale", [2.0**9, torch.tensor(2.0**9)], ids=["number", "tensor"])
@pytest.mark.situation(
    "Loss",
    "DeepSpeed scales the loss in fp16",
    "works: the scale is read from DeepSpeed's optimizer (tested with a stand-in)",
)
def test_the_scale_of_deepspeeds_own_optimizer_is_seen(scale: Any) -> None:
    """In fp16 it scales the loss by itself, and accelerate wraps it without a scaler."""
    wrapped = SimpleNamespace(scaler=None, optimizer=SimpleNamespace(loss_scale=scale))
    assert scaler_factor(wrapped) == 2.0**9
    assert scaler_factor(SimpleNamespace(scaler=None, optimizer=SimpleNamespace())) == 1.0
    assert scaler_factor(None) == 1.0


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|experimental).*")
@pytest.mark.parametrize("name", ["ORPO", "CPO"])
@pytest.mark.situation(
    "Loss",
    "ORPO or CPO with `output_router_logits=True`",
    "works: the model's own balancing loss is switched off, with a warning",
)
def test_a_preference_trainer_that_saw_the_native_loss_switched_on_trains_without_it(
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    room = importlib.import_module(f"trl.experimental.{name.lower()}")
    kind, config = getattr(room, f"{name}Trainer"), getattr(room, f"{name}Config")
    rows = [
        {"prompt": words(n, 4), "chosen": words(20 + n, 5), "rejected": words(40 + n, 6)}
        for n in range(4)
    ]
    model = tiny("mixtral")
    model.config.output_router_logits = True
    callback = BalanceCallback(mb.PhiBalancing())
    trainer = kind(
        model,
        args=config(str(tmp_path), **PLAIN, per_device_train_batch_size=2, max_length=32),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.balancing.steps == 1
    assert f"balancing loss that {kind.__name__} adds" in caplog.text
    callback.balancing.detach()
    assert trainer.aux_loss_enabled
