"""How a balancing state follows when a layer's experts change.

Experts are copied (upcycling), removed (pruning) or merged. Each number of a state follows in one
of three ways:

    a mass (a mean load)   is divided equally among the copies of its expert; the mass of a lost
                           expert goes to all others in proportion, so the sum stays the same
    a price                is the parent's, or the mean of several parents' prices
    a number of the layer  stays

So copies of one expert start with one price, and a fully copied layer has the state that it would
have had from the start. A new expert without a parent gets an even part of the mass and the mean
price. The identity changes nothing, and merging copies restores the old numbers.
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
        parents: old experts of each new expert: one if it was kept or copied, several if they were
            merged, none if it is new. Old experts that are not named are lost.
        num_parents: number of old experts.

    Raises:
        ValueError: fewer than two new experts, or a parent out of range.

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
        """From one parent, or several, for each new expert."""
        each = (p if isinstance(p, Iterable) else (p,) for p in parents)
        return cls(tuple(tuple(int(q) for q in p) for p in each), num_parents)

    @property
    def num_experts(self) -> int:
        """Number of new experts."""
        return len(self.parents)

    def mass(self, old: Float[Tensor, " old"]) -> Float[Tensor, " new"]:
        """The parents' mass, divided among their children; the sum stays the same."""
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
            # New experts get even parts; inherited mass fills the rest, evenly if it is 0.
            room, inherited = total - even * orphans.sum(), after.sum()
            after = after * (room / inherited) if inherited > 0 else (~orphans) * even
            after = torch.where(orphans, even, after)
        return after.to(old)

    def price(self, old: Float[Tensor, " old"]) -> Float[Tensor, " new"]:
        """The parent's price; the mean of several, or of all if there is no parent."""
        prices = old.double().cpu()
        each = [prices[list(parents)] if parents else prices for parents in self.parents]
        return torch.stack([own.mean() for own in each]).to(old)


@runtime_checkable
class Inherits(Protocol):
    """A state that knows how its tensors follow the experts."""

    def inherit(self, lineage: Lineage, gate: Gate) -> Any:
        """The state of the new experts, for a layer with this gate."""


def inherit(state: Any, lineage: Lineage, gate: Gate) -> Any:
    """A method's state after its layer's experts changed.

    Scalars stay, parts of a tuple follow one by one, and a state with a tensor for the experts
    has its own `inherit`.

    Raises:
        TypeError: a state with a tensor for the experts has no `inherit`.
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
