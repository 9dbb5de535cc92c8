"""Several methods at once, each with its own state: prices add, penalties add.

For example, `Together(PhiBalancing(...), LossFree(...))` balances the soft load by a charge in the
loss, and the rest of the hard load at selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add, or_
from typing import Any, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Method, Traits, forwarded, most_coupled
from moebalance.routing import Batch, Routing, Sums

T = TypeVar("T")

States = tuple[Any, ...]
"""One state for each method, in order."""


@dataclass(frozen=True, init=False)
class Together(Method):
    """A composition of methods.

    Args:
        methods: one or more. At most one may choose experts.

    Raises:
        TypeError: something else than a method.
        ValueError: none given, or several change which experts are chosen.

    >>> from moebalance.methods import LossFree, PhiBalancing, ZLoss
    >>> traits = Together(PhiBalancing(), ZLoss(), LossFree()).traits
    >>> traits.charges, traits.selects
    (True, True)
    """

    methods: tuple[Method, ...]

    def __init__(self, *methods: Method) -> None:
        for part in methods:
            if not isinstance(part, Method):
                raise TypeError(f"Together({part!r}): give methods, such as PhiBalancing().")
        if not methods:
            raise ValueError("Together(): give one method or more.")
        choosing = [part for part in methods if part.traits.selects]
        if len(choosing) > 1:
            raise ValueError(
                f"{choosing[0]!r} and {choosing[1]!r} both choose experts, and their prices would "
                "work against each other. Keep one of them; methods that charge the loss can be "
                "added to it."
            )
        object.__setattr__(self, "methods", methods)

    def __repr__(self) -> str:
        return f"Together({', '.join(map(repr, self.methods))})"

    @property
    def traits(self) -> Traits:
        """Charges or selects as one of the methods does; couples as the most coupled one."""
        parts = [part.traits for part in self.methods]
        return Traits(
            charges=any(part.charges for part in parts),
            selects=any(part.selects for part in parts),
            balances=any(part.balances for part in parts),
            has_selection_price=any(part.has_selection_price for part in parts),
            from_sums=all(part.from_sums for part in parts),
            shared=reduce(or_, (part.shared for part in parts)),
            coupling=most_coupled([part.coupling for part in parts]),
            aim=next((part.aim for part in parts if part.aim is not None), None),
        )

    def init(self, num_experts: int) -> States:
        """Start each."""
        return tuple(part.init(num_experts) for part in self.methods)

    def extra_shapes(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the first method's extra sums, then of the next one's."""
        return tuple(shape for part in self.methods for shape in part.extra_shapes(num_experts))

    def extra(self, state: States, routing: Routing) -> tuple[Tensor, ...]:
        """The extra sums of the first method, then of the next one."""
        return tuple(e for part, own in self._parts(state) for e in part.extra(own, routing))

    def update(self, state: States, sums: Sums) -> States:
        """Advance each, with its own extra sums."""
        parts = zip(self._parts(state), self._own(sums), strict=True)
        return tuple(part.update(own, own_sums) for (part, own), own_sums in parts)

    def held(self, before: States, after: States) -> States:
        """Each holds what it has to."""
        parts = zip(self.methods, before, after, strict=True)
        return tuple(part.held(old, new) for part, old, new in parts)

    def selection_price(self, state: States) -> Float[Tensor, "E"] | None:
        """The price of the method that has one."""
        return _total(part.selection_price(own) for part, own in self._parts(state))

    def price_in_nats(self, state: States) -> Float[Tensor, "E"] | None:
        """The price in nats of the method that has one."""
        return _total(part.price_in_nats(own) for part, own in self._parts(state))

    def adopt(self, state: States, price: Float[Tensor, "E"]) -> States:
        """Hand the price to each; a method without a selection price ignores it."""
        return tuple(part.adopt(own, price) for part, own in self._parts(state))

    @forwarded
    def preference(
        self,
        state: States,
        gate: Gate,
        logits: Float[Tensor, "T E"],
        *,
        mask: Bool[Tensor, "T"] | None,
        training: bool,
    ) -> Float[Tensor, "T E"] | None:
        """The preference of the method that selects."""
        for part, own in self._parts(state):
            found = part.preference(own, gate, logits, mask=mask, training=training)
            if found is not None:
                return found  # at most one method selects
        return None

    def loss_price(self, state: States, batch: Batch) -> Float[Tensor, "*rows E"] | None:
        """The sum of the prices."""
        return _total(part.loss_price(own, its) for part, own, its in self._batches(state, batch))

    def penalty(self, state: States, batch: Batch) -> Float[Tensor, ""] | None:
        """The sum of the penalties."""
        return _total(part.penalty(own, its) for part, own, its in self._batches(state, batch))

    def penalty_gradient(
        self, state: States, batch: Batch, scale: float | Tensor = 1.0
    ) -> Float[Tensor, "T E"] | None:
        """The sum of the gradients."""
        parts = self._batches(state, batch)
        return _total(part.penalty_gradient(own, its, scale) for part, own, its in parts)

    def readings(self, state: States) -> dict[str, Float[Tensor, ""]]:
        """The readings of all."""
        return reduce(or_, (part.readings(own) for part, own in self._parts(state)))

    def _parts(self, state: States) -> Iterator[tuple[Method, Any]]:
        return zip(self.methods, state, strict=True)

    def _batches(self, state: States, batch: Batch) -> Iterator[tuple[Method, Any, Batch]]:
        every = zip(self._parts(state), self._own(batch.sums), self._own(batch.step), strict=True)
        for (part, own), sums, step in every:
            yield part, own, batch._replace(sums=sums, step=step)

    def _own(self, sums: Sums) -> Iterator[Sums]:
        """The sums as each method knows them, with its own extra sums."""
        rest, num_experts = sums.extra, sums.counts.shape[-1]
        for part in self.methods:
            cut = len(part.extra_shapes(num_experts))
            yield sums._replace(extra=rest[:cut])
            rest = rest[cut:]


def _total(values: Iterable[T | None]) -> T | None:
    given = [value for value in values if value is not None]
    return reduce(add, given) if given else None
