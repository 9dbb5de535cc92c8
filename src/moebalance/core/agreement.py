"""Whether all ranks are in the same step: two numbers of a rank, sent in the step's one message.

A rank that calls `step()` twice, or skips it, sends as many messages as the others, so a count of
messages says nothing. Two numbers must be the same on all ranks: the step that a rank believes to
be in, with how often it called `discard`; and how many training steps its tokens come from. They
are 0 without a backward pass, and 2 where an optimizer step fell between two batches.

A sum over ranks shows whether a number x is everywhere the same: N Σx² = (Σx)² then, and only then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.optimizer import Optimizer

from moebalance.core.distributed import Group, gather, ranks_exist
from moebalance.core.layer import LayerBalance
from moebalance.core.updates import hear

_REMEDY = (
    "Call backward, optimizer.step() and balancing.step() equally often on every rank, and "
    "discard() on all of them or none. No state has changed and the sums were dropped: load the "
    "last checkpoint on every rank before you go on."
)
_UNSEEN = (
    "No optimizer step of torch was seen on some rank, so each batch counts as a step there. If "
    "ranks count different numbers of batches on purpose, call step() after optimizer.step(). "
)
_MOST_RANKS = 8
"""How many ranks of one kind an error names."""


class Account(NamedTuple):
    """Where a rank is in its step, when it sent its sums.

    Attributes:
        step: which it is in, from 1.
        batches: most batches that a layer counted in it, ().
        spans: how many training steps they come from, ().
        dropped: how often counted batches were discarded in it, ().
        updates: whether an optimizer step was ever seen.
        loaded: whether a state was loaded since ranks last compared themselves.
        stray: whether `reduce` was called for a second time without `step`.
    """

    step: int
    batches: Tensor
    spans: Tensor
    dropped: Tensor
    updates: bool
    loaded: bool
    stray: bool

    def __str__(self) -> str:
        if self.stray:
            return f"step {self.step}, reduce() called again without step()"
        number = int(self.batches)
        counted = f"{number or 'no'} batch{'es' * (number > 1)}"
        mixed = " before and after optimizer.step()" if self.updates and self.spans > 1 else ""
        dropped = " after discard() of others" if self.dropped > 0 else ""
        return f"step {self.step}, {counted}{mixed}{dropped}"


class Clock:
    """How many training steps the running sums of some layers come from.

    Args:
        layers: by name; they end their steps together.
    """

    def __init__(self, layers: Mapping[str, LayerBalance]) -> None:
        self.layers = layers
        self.updates = False
        """Whether an optimizer step was ever seen."""
        self._before: Tensor | None = None
        self._dropped: Tensor | None = None
        hear(self)

    @torch.no_grad()
    def saw_update(self, _optimizer: Optimizer | None = None) -> None:
        """An optimizer steps: keep what each layer had counted; the first count that is not 0."""
        self.updates = True
        if not (ranks_exist() and self.layers):
            return
        now = self._counted()
        before = self._before
        self._before = (
            now if before is None else torch.where(before > 0, before.to(now.device), now)
        )

    @torch.no_grad()
    def drop(self) -> None:
        """What was counted is about to be discarded."""
        if ranks_exist() and self.layers:
            anything = (self._counted() > 0).any().float()
            self._dropped = anything if self._dropped is None else self._dropped + anything
        self._before = None

    def begin(self) -> None:
        """A new step begins, with empty sums."""
        self._before = self._dropped = None

    @torch.no_grad()
    def read(self, *, early: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Batches, the training steps that they come from, and discards; each a number, ().

        Where no optimizer step was ever seen, each batch counts as a step.

        Args:
            early: whether the first optimizer step is still to come.
        """
        counted = self._counted()
        most = counted.max()
        dropped = torch.zeros_like(most) if self._dropped is None else self._dropped
        if not (self.updates or early):
            # Two batches are 3 here: who does not know is not like one who knows of two steps.
            return most, most + (most > 1), dropped
        spans = (counted > 0).float()
        if self._before is not None:
            before = self._before.to(counted.device)
            spans += (before > 0) & (before < counted)
        return most, spans.max(), dropped

    def _counted(self) -> Float[Tensor, "L"]:
        """How many batches each layer has counted in the running step."""
        layers = list(self.layers.values())
        device = layers[0].running.device
        # After scores, counts and tokens, see `packing`.
        counts = [layer.running[2 * layer.num_experts + 1] for layer in layers]
        return torch.stack([count.to(device) for count in counts])


def told(account: Account, ranks: int) -> Float[Tensor, "4"]:
    """What one of so many ranks adds to the message: two small numbers, and their squares."""
    most = math.isqrt(2**24 // ranks)  # float32 then adds up the squares without rounding
    dropped = account.dropped.clamp(max=3)
    place = dropped + 4 * (account.step % (most // 4))
    numbers = torch.stack([place, account.spans.clamp(max=most - 1)])
    return torch.cat([numbers, numbers.square()])


def together(total: Float[Tensor, "4"], ranks: int) -> Bool[Tensor, ""]:
    """Whether so many ranks told the same, from the sum of what they told."""
    sums, squares = total.double().chunk(2)
    return (ranks * squares == sums.square()).all()


def gathered(mine: Account, group: Group) -> list[Account]:
    """The accounts of all ranks."""
    here = {key: getattr(mine, key).cpu() for key in ("batches", "spans", "dropped")}
    return gather(mine._replace(**here), group, f"where they are in step {mine.step}")


def apart(accounts: Sequence[Account]) -> str:
    """Who is where, in words, for an error; empty if all ranks are in the same step."""
    places = {(a.step, a.spans.item(), a.dropped.item()) for a in accounts}
    if len(places) == 1 and not any(a.stray for a in accounts):
        return ""
    ranks: dict[str, list[int]] = {}
    for rank, account in enumerate(accounts):
        ranks.setdefault(str(account), []).append(rank)
    who = "; ".join(f"{_named(numbers)}: {where}" for where, numbers in ranks.items())
    unseen = "" if all(a.updates for a in accounts) else _UNSEEN
    return f"The ranks of the balancing group are not in the same step: {who}. {unseen}{_REMEDY}"


def _named(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_MOST_RANKS]))
    more = f" and {len(ranks) - _MOST_RANKS} more" if len(ranks) > _MOST_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {named}{more}"
