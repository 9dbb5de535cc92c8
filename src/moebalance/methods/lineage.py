"""Who descends from whom when a layer's experts change, and what becomes of their numbers.

A model gains experts by copying some (upcycling), loses some (pruning), or joins some (merging).
What a balancing state holds of each expert follows in one of three ways:

    a mass (a mean load)   is shared out equally among the children of an expert; what a lost
                           expert had goes to all that remain in proportion, so that the sum stays
    a price                is the parent's, the mean of several parents'
    a number of the layer  stays

so that copies of one expert start with one price, and a copied layer's state is the one that it
would have had from the start. A new expert without a parent starts with an even part of the mass
and the mean price. No expert's number changes under the identity, and merging what was copied
gives back what there was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate


@dataclass(frozen=True)
class Lineage:
    """The parents of each new expert among the old ones.

    Args:
        parents: for each new expert the old ones that it descends from: one if it is kept or
            copied, several if they were merged, none if it is new. Old ones named nowhere are lost.
        num_parents: number of old experts.

    Raises:
        ValueError: fewer than two new experts, or a parent that there is not.

    >>> Lineage.of([0, 1, 0, 1], 2).mass(torch.tensor([0.5, 0.5]))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    >>> Lineage.of([0, 2], 3).mass(torch.tensor([0.25, 0.5, 0.25]))
    tensor([0.5000, 0.5000])
    """

    parents: tuple[tuple[int, ...], ...]
    num_parents: int

    def __post_init__(self) -> None:
        if len(self.parents) < 2:
            raise ValueError(f"parents={self.parents}: a layer needs at least 2 experts.")
        named = [parent for each in self.parents for parent in each]
        strangers = sorted({p for p in named if not 0 <= p < self.num_parents})
        if strangers:
            raise ValueError(
                f"parents name the experts {strangers}, but the layer had {self.num_parents}: "
                f"number them 0 … {self.num_parents - 1}."
            )

    @classmethod
    def of(cls, parents: Iterable[int | Iterable[int]], num_parents: int) -> Lineage:
        """From a parent, or several, for each new expert."""
        each = (p if isinstance(p, Iterable) else (p,) for p in parents)
        return cls(tuple(tuple(int(q) for q in p) for p in each), num_parents)

    @property
    def num_experts(self) -> int:
        """Number of new experts."""
        return len(self.parents)

    def mass(self, old: Float[Tensor, " old"]) -> Float[Tensor, " new"]:
        """What parents had, shared out among their children; sums to what it did."""
        children = Counter(parent for each in self.parents for parent in set(each))
        rows = torch.zeros(self.num_experts, self.num_parents, dtype=torch.float64)
        for expert, each in enumerate(self.parents):
            for parent in set(each):
                rows[expert, parent] = 1 / children[parent]
        before = old.double().cpu()
        after, total = rows @ before, before.sum()
        orphans = torch.tensor([not each for each in self.parents])
        even = total / self.num_experts
        if orphans.any() or len(children) < self.num_parents:
            # What is inherited fills what the new ones leave; of nothing each gets an even part.
            room, inherited = total - even * orphans.sum(), after.sum()
            after = after * (room / inherited) if inherited > 0 else (~orphans) * even
            after = torch.where(orphans, even, after)
        return after.to(old)

    def price(self, old: Float[Tensor, " old"]) -> Float[Tensor, " new"]:
        """The parent's; the mean of several, or of all for who has none."""
        prices = old.double().cpu()
        each = [prices[list(parents)] if parents else prices for parents in self.parents]
        return torch.stack([own.mean() for own in each]).to(old)


@runtime_checkable
class Inherits(Protocol):
    """A state that says how its tensors follow the experts."""

    def inherit(self, lineage: Lineage, gate: Gate) -> Any:
        """The state of the new experts, of a layer with this gate."""


def inherit(state: Any, lineage: Lineage, gate: Gate) -> Any:
    """The state of a method after its layer's experts changed.

    Numbers of the layer stay, parts of a state follow by themselves, and a state with a tensor for
    the experts says itself how that does.

    Raises:
        TypeError: it does not.
    """
    if isinstance(state, Inherits):
        return state.inherit(lineage, gate)
    if isinstance(state, Tensor) and state.dim() == 0:
        return state
    if isinstance(state, tuple):
        parts = [inherit(part, lineage, gate) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise TypeError(
        f"A state with {type(state).__name__} does not say how it follows the experts: give its "
        "NamedTuple a method inherit(lineage, gate), as moebalance.methods.ema.Ema has."
    )
