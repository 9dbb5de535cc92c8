"""Training loops of several ranks that go wrong in some way, and what each rank held at the end.

A program is what a rank calls, step by step. The model knows which batches each message carried, so
it can say whether the sums of two steps were mixed.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moebalance import Balancing, Method
from moebalance.core.layer import LayerBalance
from moebalance.routing import Sums
from threads import town

STYLES = {
    "plain": ("count", "update", "step"),
    "early message": ("count", "reduce", "update", "step"),
    "step before the optimizer's": ("count", "step", "update"),
}
CALM = 3
"""Steps at the end without a fault, in which each mistake comes to light."""

FAULTS = ("crash", "drop", "repeat", "swap", "insert")
INSERTED = ("reduce", "step", "discard", "load", "load an earlier step")
EXPERTS = 4


class CrashError(Exception):
    """A rank is gone."""


class Fault(NamedTuple):
    """One mistake of one rank in one step.

    Attributes:
        kind: of `FAULTS`.
        place: at which call of the step.
        call: what is inserted.
    """

    kind: str
    place: int
    call: str


class Total(NamedTuple):
    """The counts of all steps, (E,)."""

    counts: Tensor


@dataclass(frozen=True, repr=False)
class Adding(Method):
    """Its state is the sum of all counts, which shows what a step was given."""

    def init(self, num_experts: int) -> Total:
        return Total(torch.zeros(num_experts, dtype=torch.float32))

    def update(self, state: Total, sums: Sums) -> Total:
        return Total(state.counts + sums.counts)


@dataclass
class Plan:
    """What all ranks are to do.

    Args:
        ranks: how many.
        style: of the loop, see `STYLES`.
        steps: number of them that may go wrong; `CALM` more follow.
        batches: of a rank in a step.
        faults: by rank and step.
        optimizer: whether optimizer steps are seen.
    """

    ranks: int
    style: str
    steps: int
    batches: dict[tuple[int, int], int] = field(default_factory=dict)
    faults: dict[tuple[int, int], Fault] = field(default_factory=dict)
    optimizer: bool = True

    def calls(self, rank: int, step: int) -> list[str]:
        """What a rank calls in a step."""
        calls = list(STYLES[self.style])
        fault = self.faults.get((rank, step))
        if fault is None:
            return calls
        place = fault.place % len(calls)
        if fault.kind == "crash":
            calls.insert(place, "crash")
        elif fault.kind == "drop":
            del calls[place]
        elif fault.kind == "repeat":
            calls.insert(place, calls[place])
        elif fault.kind == "swap":
            calls[place - 1], calls[place] = calls[place], calls[place - 1]
        else:
            calls.insert(place, fault.call)
        return calls


class Runner:
    """One rank at its work."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank, self.now = plan, rank, 0
        self.layer = LayerBalance(Adding(), EXPERTS)
        self.balancing = Balancing(Adding(), {"a": self.layer})
        self.ledger = self.balancing._ledger
        self.since: Counter[int] = Counter()
        """Tokens by step that no message has carried yet."""
        self.messages: list[Counter[int]] = []
        """Tokens by step in each message."""
        self.ended: list[int] = []
        """Which messages a step ended with."""
        self.first = copy.deepcopy(self.balancing.state_dict())

    def run(self) -> Runner:
        for step in range(self.plan.steps + CALM):
            self.now = step
            for call in self.plan.calls(self.rank, step):
                getattr(self, call.replace(" ", "_"))()
        return self

    def count(self) -> None:
        for batch in range(self.plan.batches.get((self.rank, self.now), 1)):
            tokens = 1 + (7 * self.rank + 3 * self.now + batch) % 5
            load = torch.zeros(EXPERTS)
            load[self.now % EXPERTS] = tokens
            self.layer.count(Sums(load, load, load.sum()))
            self.since[self.now] += tokens

    def reduce(self) -> None:
        self._send()
        self.balancing.reduce()

    def update(self) -> None:
        if self.plan.optimizer:
            self.ledger._clock.saw_update()

    def step(self) -> None:
        self._send()
        self.balancing.step()
        self.ended.append(len(self.messages) - 1)
        self.since.clear()

    def discard(self) -> None:
        self.balancing.discard()
        self.since.clear()

    def load(self) -> None:
        self.balancing.load_state_dict(self.balancing.state_dict())
        self.since.clear()

    def load_an_earlier_step(self) -> None:
        self.balancing.load_state_dict(self.first)
        self.since.clear()

    def crash(self) -> None:
        raise CrashError

    def _send(self) -> None:
        if self.ledger._reduction is None:
            self.messages.append(Counter(self.since))


def run(plan: Plan) -> tuple[list[Runner], list[Any]]:
    """All ranks, and how each ended: None, or its exception."""
    with town(plan.ranks) as group:
        runners: list[Runner] = [None] * plan.ranks  # type: ignore[list-item]

        def live(rank: int) -> None:
            runners[rank] = Runner(plan, rank)
            runners[rank].run()

        return runners, group.run(live)


def problem(runners: list[Runner], ends: list[Any]) -> str:
    """What must not be: a rank that ends well where another did not, or sums that are mixed."""
    if any(ends) and not all(ends):
        return f"some ranks end well: {ends}"
    strange = [e for e in ends if e is not None and not isinstance(e, RuntimeError | CrashError)]
    if strange:
        return f"not an error of ours: {strange}"
    for runner in runners:
        expected = torch.zeros(EXPERTS)
        for number in runner.ended:
            sent = [r.messages[number] for r in runners if number < len(r.messages)]
            mixed = len(sent) < len(runners) or len({frozenset(m) for m in sent}) > 1
            if mixed:
                return f"rank {runner.rank} ended a step with {sent}"
            for step, tokens in sum(sent, Counter()).items():
                expected[step % EXPERTS] += tokens
        if "load an earlier step" not in str(runner.plan.faults) and not torch.equal(
            runner.layer.state.counts, expected
        ):
            return f"rank {runner.rank} holds {runner.layer.state.counts}, not {expected}"
    return ""
