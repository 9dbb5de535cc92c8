"""Pipeline stages: torch's trial runs are not counted, ragged micro-batches are."""

from __future__ import annotations

import logging
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

import moebalance as mb
from cases import METHODS
from layout_cases import ONE, Layout, cuts
from layout_models import EXPERTS, WIDTH, Stack, losses
from layouts import SAME_STATE, difference, train_all
from moebalance import Balancing
from moebalance.integrations.pipelining import ignore_trial_runs
from processes import run

PHI = mb.PhiBalancing(strength=0.1, peek=False)
BATCH, MICRO_BATCHES = 24, 4
"""Tokens that every stage sees in a step."""

RAGGED = {
    "PP 2, padding": Layout((cuts(2, 2, 2, 2),) * 2, staged=True, alone=True, tokens="ragged"),
    "PP 2, two micro-batches empty": Layout(
        (cuts(2, 2, 2, 2),) * 2, staged=True, alone=True, tokens="first half"
    ),
}
UNTRAINED = ("phi-negative-entropy", "phi-hard", "ema-switch", "phi-and-loss-free")
"""Methods that the harness does not train: the weights of ragged micro-batches are not exact."""


class Stages(NamedTuple):
    """What one rank of two saw.

    Attributes:
        sums: packed sums of a step, by how the shapes of the stages became known.
        tokens: of evaluation, and of the training step after it, without and with being ignored.
        looped: tokens of each of this rank's two layers under one handle.
        ragged: as of `train_all`.
    """

    sums: dict[str, Tensor]
    tokens: dict[bool, tuple[float, float]]
    looped: list[float]
    ragged: dict


def stages() -> Stages:
    sums = {
        "given": one_step(given=True, ignored=False),
        "tried, counted": one_step(given=False, ignored=False),
        "tried, ignored": one_step(given=False, ignored=True),
    }
    tokens = {ignored: evaluated_between(ignored=ignored) for ignored in (False, True)}
    return Stages(sums, tokens, looped(), train_all(RAGGED, UNTRAINED))


@pytest.fixture(scope="module")
def two():
    return run(stages, 2)


def built(*, given: bool, ignored: bool) -> tuple[Stack, Balancing, Schedule1F1B]:
    """One of two stages, and what drives it."""
    rank = dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([1])]
    part = Stack(PHI, layers=[rank])
    balancing = mb.attach(part, group=groups[rank])
    shapes = {}
    if given:
        micro = inputs()[: len(inputs()) // MICRO_BATCHES]
        shapes = {
            "input_args": micro.clone().requires_grad_(rank > 0),
            "output_args": micro.clone().requires_grad_(),
        }
    stage = PipelineStage(part, rank, 2, torch.device("cpu"), **shapes)
    if ignored:
        ignore_trial_runs([stage], balancing.layers.values())
    loss = lambda hidden, _: losses(hidden).mean()  # noqa: E731
    return part, balancing, Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss)


def fill(schedule: Schedule1F1B | ScheduleInterleaved1F1B, how: str = "step") -> None:
    """Run a whole batch through the stages."""
    if dist.get_rank() == 0:
        getattr(schedule, how)(inputs())
    else:
        getattr(schedule, how)(target=inputs())


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, WIDTH, generator=generator, dtype=torch.float64)


def one_step(*, given: bool, ignored: bool) -> Tensor:
    _, balancing, schedule = built(given=given, ignored=ignored)
    fill(schedule)
    (layer,) = balancing.layers.values()
    return layer.running.clone()


def evaluated_between(*, ignored: bool) -> tuple[float, float]:
    """torch tries its stages anew whenever training turns to evaluation, or back."""
    part, balancing, schedule = built(given=False, ignored=ignored)
    fill(schedule)
    balancing.discard()
    part.eval()
    balancing.watch()
    fill(schedule, "eval")
    seen = balancing.evaluation()[0]["tokens"]
    part.train()
    fill(schedule)
    (layer,) = balancing.layers.values()
    return seen, layer.running[2 * EXPERTS].item()


def looped() -> list[float]:
    """Two stages on each rank, under one handle."""
    group = [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]
    numbers = (dist.get_rank(), dist.get_rank() + 2)
    parts = {number: Stack(PHI, layers=[number]) for number in numbers}
    layers = {f"{n}": part.layers[str(n)].router for n, part in parts.items()}
    balancing = Balancing(PHI, layers, group=group)
    tried = [PipelineStage(part, n, 4, torch.device("cpu")) for n, part in parts.items()]
    ignore_trial_runs(tried, balancing.layers.values())
    schedule = ScheduleInterleaved1F1B(
        tried, MICRO_BATCHES, loss_fn=lambda hidden, _: losses(hidden).mean()
    )
    fill(schedule)
    return [layer.running[2 * EXPERTS].item() for layer in balancing.layers.values()]


def test_a_trial_run_for_the_shapes_of_a_stage_is_not_counted(two):
    for rank in two:
        assert rank.sums["given"][2 * EXPERTS] == BATCH
        assert torch.equal(rank.sums["tried, ignored"], rank.sums["given"])
        assert rank.looped == [BATCH, BATCH]


def test_a_trial_run_is_counted_where_nobody_ignores_it(two):
    """What the test above is held against: if this fails, torch has changed."""
    counted = [rank.sums["tried, counted"][2 * EXPERTS] for rank in two]
    # The first stage's inputs need no gradient, and so nothing goes back through it.
    assert counted == [BATCH, BATCH + BATCH / MICRO_BATCHES]


def test_a_trial_run_between_training_and_evaluation_is_not_counted_in_either(two):
    for rank in two:
        assert rank.tokens[True] == (BATCH, BATCH)
        seen, _ = rank.tokens[False]
        assert seen == BATCH + BATCH / MICRO_BATCHES


def test_a_stage_that_is_tried_in_an_unknown_way_is_named(caplog):
    with caplog.at_level(logging.WARNING, logger="moebalance"):
        ignore_trial_runs([object()], [])
    (record,) = caplog.records
    assert "give it input_args and output_args" in record.message


@pytest.mark.parametrize("method", UNTRAINED)
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_micro_batches_make_the_state_of_one_batch_without_the_loss_on_the_stage(
    name, method, two
):
    tokens = RAGGED[name].tokens
    one = train_all({tokens: ONE[tokens]}, [method])[tokens, method]
    found = difference([rank.ragged[name, method] for rank in two], one, METHODS[method])
    assert found.state <= SAME_STATE
    assert found.sums <= SAME_STATE
