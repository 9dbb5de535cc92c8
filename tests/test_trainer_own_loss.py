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
from training import BalanceCallback, Rows, agree, light_collections, plain, scaled, term_gradients


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
