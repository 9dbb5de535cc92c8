"""Ranks one step apart: each of them errs, before the sums of two steps are mixed."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import moebalance as mb
from moebalance import Balancing, LossFree
from moebalance.core import step as ledger
from moebalance.core.layer import LayerBalance
from moebalance.routing import Sums
from threads import town

STEPS = 5
LAYERS = ("a", "b")


class Rank:
    """One rank of a training run: what a training loop calls, and what its handle then holds."""

    def __init__(self, rank: int, *, optimizer: bool = True) -> None:
        self.rank, self.optimizer = rank, optimizer
        self.layers = {name: LayerBalance(LossFree(), 4, name=name) for name in LAYERS}
        self.balancing = Balancing(LossFree(), self.layers)
        self.tokens: list[float] = []
        self.price = torch.zeros(4)

    def backward(self) -> None:
        load = torch.tensor([4.0, 3.0, 2.0, 1.0])
        for layer in self.layers.values():
            layer.count(Sums(load, load, load.sum()))

    def update(self) -> None:
        if self.optimizer:
            self.balancing._ledger._clock.saw_update()

    def step(self) -> None:
        self.balancing.step()
        self.price = self.layers["a"].price.clone()
        self.tokens.append(self.balancing.metrics()["tokens"])

    def train(self, fault: Callable[[Rank], None] | None = None, *, at: int = 3) -> Rank:
        """Some steps, in one of which something else is done."""
        for number in range(1, STEPS + 1):
            if fault is not None and number == at:
                fault(self)
                continue
            self.backward()
            self.update()
            self.step()
        return self


def twice(rank: Rank) -> None:
    rank.backward()
    rank.update()
    rank.step()
    rank.step()


def twice_around_the_optimizer(rank: Rank) -> None:
    rank.backward()
    rank.step()
    rank.update()
    rank.step()


def skipped(rank: Rank) -> None:
    rank.backward()
    rank.update()


def skipped_but_sent(rank: Rank) -> None:
    """`reduce()` is called in two steps, and `step()` in none."""
    for _ in range(2):
        rank.backward()
        rank.balancing.reduce()
        rank.update()


def dropped(rank: Rank) -> None:
    rank.backward()
    rank.update()
    rank.balancing.discard()


def dropped_and_ended(rank: Rank) -> None:
    dropped(rank)
    rank.step()


def dropped_under_way(rank: Rank) -> None:
    rank.backward()
    rank.balancing.reduce()
    rank.update()
    rank.balancing.discard()


def counted_late(rank: Rank) -> None:
    """This rank raises in the step itself, and goes on with its loop all the same."""
    rank.backward()
    rank.balancing.reduce()
    rank.backward()
    rank.update()
    with pytest.raises(RuntimeError, match=r"between reduce\(\) and step\(\)"):
        rank.step()


def loaded_the_step_before(rank: Rank) -> None:
    rank.balancing.load_state_dict({**rank.balancing.state_dict(), "steps": 1})
    rank.backward()
    rank.update()
    rank.step()


FAULTS = {
    "calls step() twice": (twice, "rank 1: step 4, no batch"),
    "calls step() before and after optimizer.step()": (
        twice_around_the_optimizer,
        "rank 1: step 4, no batch",
    ),
    "skips step()": (
        skipped,
        r"rank 1: step 3, 2 batches before and after optimizer\.step\(\)",
    ),
    "calls reduce() without step()": (
        skipped_but_sent,
        r"rank 1: step 3, reduce\(\) called again without step\(\)",
    ),
    "calls discard() and skips step()": (
        dropped,
        r"rank 1: step 3, 1 batch after discard\(\) of others",
    ),
    "calls discard() and step()": (
        dropped_and_ended,
        r"rank 1: step 3, no batch after discard\(\) of others",
    ),
    "calls discard() with its message under way": (
        dropped_under_way,
        "rank 1: step 3, 1 batch",
    ),
    "counts after reduce()": (counted_late, "rank 1: step 3, 1 batch"),
    "loads the state of an earlier step": (
        loaded_the_step_before,
        "Ranks 0 and 1 of the balancing group differ in steps: 2 and 1",
    ),
}


@pytest.mark.survives(
    "Ranks",
    "One rank calls `step()` twice, skips it, calls `reduce()` without it, drops a step by "
    "`discard()`, counts late, or loads an earlier step",
    "error: on every rank at the first message that would mix steps, with who is where",
)
@pytest.mark.parametrize("optimizer", [True, False], ids=["", "without an optimizer"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_rank_errs_when_one_of_them(fault, optimizer):
    act, words = FAULTS[fault]
    ranks = [Rank(number, optimizer=optimizer) for number in range(3)]
    with town(3) as group:
        answers = group.run(lambda n: ranks[n].train(act if n == 1 else None))
    if optimizer is False and "skips" in fault:
        words = words.partition(" before")[0]
    for rank, answer in zip(ranks, answers, strict=True):
        assert isinstance(answer, RuntimeError), answer
        assert re.search(words, str(answer))
        # Every step that ended had the 10 tokens of each rank, and the failed one moved no price.
        assert set(rank.tokens) == {30}
        assert torch.equal(rank.layers["a"].price, rank.price)


@pytest.mark.parametrize(("act", "sound"), [(twice, 3), (skipped, 2), (dropped, 2)])
def test_on_another_device_every_rank_errs_a_step_later_and_no_price_has_moved(
    act, sound, monkeypatch
):
    """A CUDA device decides itself whether sums may move the state; the host reads that later."""
    event = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(ledger, "_send", lambda verdict: verdict._replace(arrived=event))
    ranks = [Rank(number) for number in range(3)]
    with town(3) as group:
        answers = group.run(lambda n: ranks[n].train(act if n == 1 else None))
    for rank, answer in zip(ranks, answers, strict=True):
        assert "not in the same step: ranks 0, 2: step " in str(answer)
        moved = rank.layers["a"].price.abs()
        torch.testing.assert_close(moved, torch.full((4,), 0.001 * sound))


@pytest.mark.survives(
    "Ranks",
    "All ranks skip or drop the same step",
    "goes on: with equal sums on all",
)
def test_ranks_that_all_do_the_same_are_in_the_same_step():
    for act in (skipped, dropped, dropped_under_way):
        with town(2) as group:
            answers = group.run(lambda n, act=act: Rank(n).train(act))
        for rank in answers:
            assert isinstance(rank, Rank), rank
            assert rank.balancing.steps == STEPS - 1
            assert set(rank.tokens) - {40} == {20}


@pytest.mark.survives(
    "Ranks",
    "Ranks run different numbers of micro-batches",
    "goes on: exact",
)
def test_ranks_may_run_different_numbers_of_micro_batches_once_an_optimizer_steps():
    def work(number: int) -> Rank:
        rank = Rank(number)
        for _ in range(3):
            for _ in range(1 + 2 * number):
                rank.backward()
            if number == 1:
                rank.balancing.reduce()  # before the first optimizer step
            rank.update()
            rank.step()
        return rank

    with town(2) as group:
        for rank in group.run(work):
            assert rank.tokens == [40.0] * 3


@pytest.mark.survives(
    "Ranks",
    "Ranks count different numbers of batches, and no optimizer steps",
    "error: on every rank, with the remedy",
)
def test_without_an_optimizer_different_numbers_of_batches_are_refused_with_the_remedy():
    def work(number: int) -> None:
        rank = Rank(number, optimizer=False)
        for _ in range(1 + number):
            rank.backward()
        rank.step()

    with town(2) as group:
        for error in group.run(work):
            assert "rank 0: step 1, 1 batch; rank 1: step 1, 2 batches. " in str(error)
            assert "call step() after optimizer.step()" in str(error)


def test_a_step_can_go_on_after_the_ranks_have_erred_in_the_same_step():
    def work(number: int) -> Rank:
        rank = Rank(number)
        if number == 0:
            rank.backward()
        with pytest.raises(RuntimeError, match="not in the same step"):
            rank.step()
        return rank

    def go_on(number: int) -> list[float]:
        ranks[number].backward()
        ranks[number].balancing.load_state_dict(start)
        return ranks[number].train().tokens

    start = Rank(0).balancing.state_dict()
    with town(2) as group:
        ranks = group.run(work)
    with town(2) as group:
        assert group.run(go_on) == [[20.0] * STEPS] * 2


@pytest.mark.survives(
    "Ranks",
    "A rank ends before the others, or never starts",
    "error: on the others, with step and layers",
)
def test_a_rank_that_never_comes_is_told_by_step_and_layers():
    def work(number: int) -> Rank | None:
        return Rank(number).train() if number else None

    with town(3) as group:
        first, *others = group.run(work)
    assert first is None
    for error in others:
        assert "other ranks to send what they balance in step 1: Timed out." in str(error)

    with town(3) as group:
        _, *others = group.run(lambda n: Rank(n).train(_leave if n == 0 else None, at=4))
    for error in others:
        assert "Waited 0 s for the other ranks to send their sums of a, b in step 4" in str(error)
        assert "start from the last checkpoint" in str(error)


def _leave(_: Rank) -> None:
    raise SystemError


@pytest.mark.survives(
    "Killed and resumed",
    "A state of four ranks is resumed by 1, 2, 3 or 5",
    "goes on: bit for bit the same",
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_state_is_resumed_by_any_number_of_ranks(ranks):
    """Twelve batches a step, shared out over them."""

    def train(number: int, state: dict | None, of: int) -> dict:
        rank = Rank(number)
        if state is not None:
            rank.balancing.load_state_dict(state)
        for _ in range(2):
            for _ in range(len(range(number, 12, of))):
                rank.backward()
            rank.update()
            rank.step()
        return rank.balancing.state_dict()

    with town(4) as group:
        saved, *_ = group.run(lambda n: train(n, None, 4))
    with town(ranks) as group:
        ended = group.run(lambda n: train(n, saved, ranks))
    with town(4) as group:
        whole, *_ = group.run(lambda n: train(n, saved, 4))
    for state in ended:
        assert state["steps"] == 4
        for name in LAYERS:
            for key, tensor in whole["layers"][name].items():
                # How many tokens a batch had is of this layout.
                assert key == "last_step" or torch.equal(state["layers"][name][key], tensor)


@pytest.mark.survives(
    "Killed and resumed",
    "Many ranks resume from one state file at once (16 threads here; 64 processes by hand: read in "
    "4 s, three steps after 8 s on two busy cores, `benchmarks/resume.py`)",
    "goes on: with the same state on all",
)
def test_many_ranks_resume_from_one_file_at_once(tmp_path):
    saved = Rank(0).train().balancing
    mb.huggingface.save(saved, tmp_path)

    def resume(number: int) -> dict:
        rank = Rank(number)
        mb.huggingface.load(rank.balancing, tmp_path)
        return rank.train().balancing.state_dict()

    with town(16) as group:
        states = group.run(resume)
    for state in states:
        assert state["steps"] == 2 * STEPS
        assert all(
            torch.equal(tensor, states[0]["layers"][name][key])
            for name in LAYERS
            for key, tensor in state["layers"][name].items()
        )
