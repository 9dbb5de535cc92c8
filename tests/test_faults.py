"""What must not pass in silence among ranks: strangers in a group, and a sick one."""

from __future__ import annotations

import copy
import datetime
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moebalance as mb
from cases import plain_top_k
from layout_models import WIDTH, Stack, losses
from moebalance import Balancing, LossFree, PhiBalancing, Together
from moebalance.core.layer import LayerBalance
from moebalance.routing import measure
from processes import COLLECTIVE_S, Collectives, run

PHI = PhiBalancing(strength=0.1, rate=0.5)
States = dict[str, dict[str, Tensor]]


def states(balancing: Balancing) -> States:
    return copy.deepcopy(balancing.state_dict()["layers"])


def same(a: States, b: States) -> bool:
    """Bit for bit."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name][key], b[name][key]) for name in a for key in a[name])


Refusals = dict[str, tuple[str, float]]
"""What was said to each mismatch, and after how many seconds."""

Poisoned = dict[tuple[str, bool, bool], tuple[str, States, States, int]]
"""By method, metrics of all ranks, message sent early: words, states before and after, steps."""


class Faults(NamedTuple):
    """What one rank of two saw."""

    refused: Refusals
    moments: Moments
    poisoned: Poisoned
    skipped: tuple[str, float]
    stuck: tuple[str, float]


def faults() -> Faults:
    return Faults(refusals(MISMATCHES), moments(), poison(), skip(), wait_in_vain())


@pytest.fixture(scope="module")
def two():
    return run(faults, 2)


# --- ranks that do not belong together --------------------------------------------------------


def hand(method=PHI, names="ab", experts=4, **options: Any) -> Balancing:
    """A handle on layers without a model."""
    layers = {name: LayerBalance(method, experts, name=name) for name in names}
    return Balancing(method, layers, **options)


def count(balancing: Balancing, tokens: int = 8) -> None:
    for number, layer in enumerate(balancing.layers.values()):
        generator = torch.Generator().manual_seed(number)
        logits = torch.randn(tokens, layer.num_experts, generator=generator)
        layer.count(measure(plain_top_k(logits, 2)))


def resumed(rank: int, *, after: int = 0) -> Balancing:
    balancing = hand()
    for _ in range(after):
        count(balancing)
        balancing.step()
    balancing.load_state_dict({**balancing.state_dict(), "steps": 7 * rank})
    return balancing


def loaded_alone(rank: int, *, steps: int, early: bool = False) -> Balancing:
    """Rank 1 loads a state after the second step, and rank 0 goes on."""
    balancing = hand()
    for _ in range(2):
        count(balancing)
        balancing.step()
    if rank == 1:
        balancing.load_state_dict({**balancing.state_dict(), "steps": steps})
    if early:
        count(balancing)
        balancing.reduce()
    return balancing


Mismatch = tuple[Callable[[int], Balancing], str]

MISMATCHES: dict[str, Mismatch] = {
    "method": (lambda rank: hand((PHI, LossFree())[rank]), "differ in method"),
    "hyper-parameter": (
        lambda rank: hand(PhiBalancing(strength=(0.1, 0.2)[rank])),
        r"strength=0\.1,.*strength=0\.2,",
    ),
    "experts": (lambda rank: hand(experts=(4, 8)[rank]), "differ in layers"),
    "names": (lambda rank: hand(names=("ab", "ac")[rank]), "differ in layers"),
    "number of layers": (lambda rank: hand(names=("ab", "a")[rank]), "differ in layers"),
    "resumed on one rank only": (resumed, "differ in steps: 0 and 7"),
    "order of layers": (lambda rank: hand(names=("ab", "ba")[rank]), "differ in layers"),
    "metrics": (lambda rank: hand(global_metrics=rank == 0), "differ in metrics"),
    "no layers": (lambda rank: hand(names=("ab", "")[rank]), "differ in layers"),
    "resumed apart after a step": (lambda rank: resumed(rank, after=1), "differ in steps: 0 and 7"),
    "loaded on one rank alone": (
        lambda rank: loaded_alone(rank, steps=7),
        "differ in steps: 2 and 7",
    ),
    "loaded on one rank alone, many steps on": (
        lambda rank: loaded_alone(rank, steps=2 + 2**40),
        f"differ in steps: 2 and {2 + 2**40}",
    ),
    "loaded on one rank alone, before an early message": (
        lambda rank: loaded_alone(rank, steps=7, early=True),
        "differ in steps: 2 and 7",
    ),
}


def refusals(cases: dict[str, Mismatch]) -> Refusals:
    """What each mismatch is told on this rank."""
    found = {}
    for case, (build, _) in cases.items():
        balancing = build(dist.get_rank())
        count(balancing)
        start = time.monotonic()
        found[case] = refusal(balancing, RuntimeError), time.monotonic() - start
    return found


@pytest.mark.survives(
    "Ranks",
    "Ranks differ in method, hyper-parameters, layers, their order or number, steps or metrics",
    "refused: on every rank before the first message, with the ranks and the difference",
)
@pytest.mark.parametrize("case", MISMATCHES)
def test_ranks_that_balance_different_things_are_refused_on_every_one_of_them(case, two):
    for rank in two:
        message, seconds = rank.refused[case]
        assert "Ranks 0 and 1 of the balancing group" in message
        assert re.search(MISMATCHES[case][1], message)
        assert seconds < COLLECTIVE_S / 4


def test_a_handle_without_layers_steps_for_a_pipeline_stage_that_has_none():
    balancing = hand(names="")
    balancing.step()
    assert balancing.steps == 1
    assert balancing.metrics() == {}


# --- the message at the wrong moment ----------------------------------------------------------


class Moments(NamedTuple):
    """What one rank of two saw."""

    outsider: str
    late: str
    after_late: float
    after_load: list[float]
    after_load_alone: tuple[float, list[str], list[str]]


def moments() -> Moments:
    """A group that rank 1 is not in; tokens after `reduce`; loads and a drop; one rank's load."""
    outside = hand(group=dist.new_group([0]))
    count(outside)
    said = refusal(outside, ValueError)

    balancing = hand()
    start = balancing.state_dict()
    count(balancing)
    balancing.reduce()
    count(balancing)
    late = refusal(balancing, RuntimeError)
    count(balancing, 6)
    balancing.step()
    after_late = tokens(balancing)

    after_load = []
    for forget in (lambda: balancing.load_state_dict(start), balancing.discard):
        count(balancing, 5)
        balancing.reduce()
        forget()
        count(balancing, 3)
        balancing.step()
        after_load.append(tokens(balancing))

    if dist.get_rank() == 1:
        balancing.load_state_dict(balancing.state_dict())
    messages = []
    for _ in range(2):
        count(balancing, 7)
        with Collectives() as collectives:
            balancing.step()
        messages.append([name for name, _ in collectives.seen])
    return Moments(said, late, after_late, after_load, (tokens(balancing), *messages))


def refusal(balancing: Balancing, kind: type[Exception]) -> str:
    """What a step says that is refused; nothing where it is not."""
    try:
        balancing.step()
    except kind as error:
        return str(error)
    return ""


def tokens(balancing: Balancing) -> float:
    return balancing.metrics()["tokens"]


@pytest.mark.survives(
    "Ranks",
    "A rank is not in the group that it was given",
    "refused: on that rank",
)
def test_a_rank_outside_of_the_group_it_was_given_does_not_balance_alone(two):
    assert two[0].moments.outsider == ""
    assert "Rank 1 is not in the balancing group" in two[1].moments.outsider


@pytest.mark.survives(
    "Ranks",
    "All ranks count tokens between `reduce()` and `step()`",
    "error: the step's sums are dropped, and the next step is sound",
)
def test_tokens_that_come_too_late_for_the_message_are_not_lost_in_silence(two):
    for rank in two:
        assert "between reduce() and step() in step 1" in rank.moments.late
        assert rank.moments.after_late == 12


@pytest.mark.survives(
    "Ranks",
    "All ranks load a state, or call `discard()`, with the message under way",
    "goes on: with the next step's tokens alone",
)
def test_a_message_under_way_is_forgotten_with_its_step(two):
    for rank in two:
        assert rank.moments.after_load == [6, 6]


@pytest.mark.survives(
    "Ranks",
    "One rank loads a state of the step that all are in",
    "goes on: after one comparison",
)
def test_a_load_on_one_rank_of_the_step_that_all_are_in_is_compared_once_and_goes_on(two):
    for rank in two:
        counted, first, second = rank.moments.after_load_alone
        assert counted == 14
        assert first[0] == "allreduce_"
        assert len(first) > 1
        assert second == ["allreduce_"]


# --- a sick rank ------------------------------------------------------------------------------

METHODS = {"phi": PHI, "loss-free": LossFree(), "both": Together(PHI, LossFree())}


def poison() -> Poisoned:
    """NaN logits in the second layer of rank 1 in step 3, then a clean step."""
    found = {}
    for name, method in METHODS.items():
        for all_metrics in (True, False):
            for early in (True, False):
                model = Stack(method)
                balancing = mb.attach(model)
                balancing.global_metrics = all_metrics
                gate = model.layers["1"].gate.data
                healthy = gate.clone()
                said, before, after = "", {}, {}
                for step in range(4):
                    if step == 2:
                        before = states(balancing)
                        gate.mul_(torch.nan if dist.get_rank() == 1 else 1.0)
                    losses(model(batch(step, 4))).mean().backward()
                    if early:
                        balancing.reduce()
                    try:
                        balancing.step()
                    except FloatingPointError as error:
                        said, after = str(error), states(balancing)
                    gate.copy_(healthy)
                found[name, all_metrics, early] = said, before, after, balancing.steps
    return found


def batch(step: int, sequences: int) -> Tensor:
    """This rank's own hidden states (B, 4, D)."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(sequences, 4, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.survives(
    "Ranks",
    "One rank has NaN logits",
    "error: on every rank, with layer, rank and step",
)
@pytest.mark.parametrize("early", [False, True], ids=["", "reduced early"])
@pytest.mark.parametrize("all_metrics", [True, False], ids=["all metrics", "own metrics"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_on_one_rank_stops_all_of_them_and_harms_none(method, all_metrics, early, two):
    for rank in two:
        said, before, after, steps = rank.poisoned[method, all_metrics, early]
        assert "logits in layers.1.router on rank 1 during step 3." in said
        assert before
        assert same(before, after)
        assert steps == 3


# --- a rank astray; all its ways are in test_ranks_astray.py ------------------------------------


def skip() -> tuple[str, float]:
    """Rank 1 forgets `step()` once in a real loop; what it is told, and after how long."""
    model = Stack(PHI)
    balancing = mb.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        start = time.monotonic()
        losses(model(batch(step, 2))).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 and dist.get_rank() == 1:
            continue
        try:
            balancing.step()
        except RuntimeError as error:
            return str(error), time.monotonic() - start
    return "", 0.0


def wait_in_vain(timeout_s: float = 2) -> tuple[str, float]:
    """Rank 1 does not come to the second step; what rank 0 is told, and after how long."""
    balancing = hand(group=dist.new_group(timeout=datetime.timedelta(seconds=timeout_s)))
    count(balancing)
    dist.barrier()  # on a busy machine one of them may be late
    balancing.step()
    start = time.monotonic()
    if dist.get_rank() == 1:
        time.sleep(2 * timeout_s)
        return "", 0.0
    count(balancing)
    return refusal(balancing, RuntimeError), time.monotonic() - start


@pytest.mark.survives(
    "Ranks",
    "One rank forgets `step()` once, in a real training loop of two processes",
    "error: on every rank in seconds, with each rank's step and batches",
)
def test_a_rank_that_forgets_step_stops_all_of_them_in_seconds(two):
    for rank in two:
        said, seconds = rank.skipped
        assert "rank 0: step 2, 1 batch; rank 1: step 2, 2 batches before and after" in said
        assert seconds < COLLECTIVE_S / 4


@pytest.mark.survives(
    "Ranks",
    "One rank is stuck",
    "error: on the others at the timeout, with step and layers",
)
def test_a_rank_that_waits_for_a_stuck_one_is_told_the_step_and_the_layers(two):
    said, seconds = two[0].stuck
    assert re.search(r"Waited \d s for the other ranks to send their sums of a, b in step 2", said)
    assert seconds < COLLECTIVE_S / 2
