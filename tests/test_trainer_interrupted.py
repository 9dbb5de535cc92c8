"""A Trainer that is interrupted leaves the handle as it found it, for a loop of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import moebalance as mb
from families import tiny, tokens
from training import (
    BalanceCallback,
    FixedPrice,
    Rows,
    agree,
    light_collections,
    plain,
    router_gradient,
)


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


class Interrupt(TrainerCallback):
    """Ctrl-C after the first of several micro-batches."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


class Forwards(TrainerCallback):
    """A training forward of a callback's own, in the middle of a step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"](input_ids=tokens(1, 4))


def own_step(folder: Path, strength: float, *, interrupted: bool) -> tuple[Tensor, float]:
    """Router gradient and tokens of a step by hand, perhaps after a Trainer that was stopped."""
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, FixedPrice(strength))
    if interrupted:
        make = plain(folder, Rows(8), gradient_accumulation_steps=4)
        with pytest.raises(KeyboardInterrupt):
            make(model, [BalanceCallback(balancing), Interrupt()]).train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    return router_gradient(model), balancing.metrics()["tokens"]


def test_a_loop_after_an_interrupted_trainer_has_its_own_strength_and_counts_its_own_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (term, tokens_after), (without, _) = (
        own_step(tmp_path, strength, interrupted=True) for strength in (1.0, 0.0)
    )
    (expected, tokens_alone), (bare, _) = (
        own_step(tmp_path, strength, interrupted=False) for strength in (1.0, 0.0)
    )
    assert agree(term - without, expected - bare)
    assert tokens_after == tokens_alone == tokens().numel()
    assert "adds up the mean losses" not in caplog.text


def test_a_training_forward_of_a_callback_does_not_end_the_trainers_loop(tmp_path: Path) -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.PhiBalancing())
    make = plain(tmp_path, Rows(4), gradient_accumulation_steps=2)
    make(model, [BalanceCallback(balancing), Forwards()]).train()
    assert balancing.metrics()["tokens"] == 4 * 12


def test_a_trainer_that_ended_watches_no_forward(tmp_path: Path) -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.PhiBalancing())
    hooks = len(model._forward_pre_hooks)
    for _ in range(2):
        plain(tmp_path, Rows(4))(model, [BalanceCallback(balancing)]).train()
        assert len(model._forward_pre_hooks) == hooks
    torch.testing.assert_close(balancing.loss_scales()[0], torch.tensor(1.0))
