"""Two methods at once, each with its own state: prices add, penalties add.

`Together(PhiBalancing(...), LossFree(...))` charges the expected soft distribution in the loss and
settles the remaining hard imbalance at selection.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Coupling, MeanPrice, Method, more_coupled
from moebalance.proportions import Proportions
from moebalance.routing import Batch, Routing, Sums


class Both(NamedTuple):
    """The states of the two methods."""

    first: Any
    second: Any


@dataclass(frozen=True)
class Together(Method):
    """Composition of two methods; nest it for more.

    Args:
        first: any method.
        second: any method. At most one of the two may choose experts.

    Raises:
        ValueError: if both change which experts are chosen.

    >>> from moebalance.methods.loss_free import LossFree
    >>> from moebalance.methods.phi import PhiBalancing
    >>> both = Together(PhiBalancing(), LossFree())
    >>> both.charges, both.selects
    (True, True)
    """

    first: Method
    second: Method

    def __post_init__(self) -> None:
        for part in (self.first, self.second):
            if not isinstance(part, Method):
                raise TypeError(f"Together composes methods; got {part!r}.")
        if self.first.selects and self.second.selects:
            raise ValueError(
                f"{self.first!r} and {self.second!r} both choose experts, and their prices would "
                "work against each other: compose a loss-lever method with a selection-lever one."
            )

    def init(self, num_experts: int) -> Both:
        """Start both."""
        return Both(self.first.init(num_experts), self.second.init(num_experts))

    def extra_shapes(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the first's extra sums, then of the second's."""
        return (*self.first.extra_shapes(num_experts), *self.second.extra_shapes(num_experts))

    def extra(self, state: Both, routing: Routing) -> tuple[Tensor, ...]:
        """Extra sums of the first, then of the second."""
        return (
            *self.first.extra(state.first, routing),
            *self.second.extra(state.second, routing),
        )

    def update(self, state: Both, sums: Sums) -> Both:
        """Advance both, each with its own extra sums."""
        first, second = self._split(sums)
        return Both(self.first.update(state.first, first), self.second.update(state.second, second))

    def price(self, state: Both) -> Float[Tensor, "E"] | None:
        """The price of the one that has one."""
        return _sum(self.first.price(state.first), self.second.price(state.second))

    def adopt(self, state: Both, price: Float[Tensor, "E"]) -> Both:
        """Hand the price to both; who does not select ignores it."""
        return Both(self.first.adopt(state.first, price), self.second.adopt(state.second, price))

    def preference(
        self,
        state: Both,
        gate: Gate,
        logits: Float[Tensor, "T E"],
        *,
        mask: Bool[Tensor, "T"] | None,
        training: bool,
    ) -> Float[Tensor, "T E"] | None:
        """The preference of the one that has one."""
        part, own = (
            (self.second, state.second) if self.second.selects else (self.first, state.first)
        )
        return part.preference(own, gate, logits, mask=mask, training=training)

    def charged(self, state: Both, batch: Batch) -> Float[Tensor, "*rows E"] | None:
        """Sum of both charges."""
        return _sum(*(p.charged(s, b) for p, s, b in self._parts(state, batch)))

    def mean_price(self, state: Both) -> MeanPrice | None:
        """That of the one that charges, if only one does."""
        if self.first.charges and self.second.charges:
            return None
        if self.second.charges:
            return self.second.mean_price(state.second)
        return self.first.mean_price(state.first)

    def penalty(self, state: Both, batch: Batch) -> Float[Tensor, ""] | None:
        """Sum of both penalties."""
        return _sum(*(p.penalty(s, b) for p, s, b in self._parts(state, batch)))

    def logit_gradient(
        self, state: Both, batch: Batch, scale: float | Tensor = 1.0
    ) -> Float[Tensor, "T E"] | None:
        """Sum of both gradients."""
        return _sum(*(p.logit_gradient(s, b, scale) for p, s, b in self._parts(state, batch)))

    def readings(self, state: Both) -> dict[str, Float[Tensor, ""]]:
        """Those of the first, then of the second."""
        return self.first.readings(state.first) | self.second.readings(state.second)

    @property
    def from_sums(self) -> bool:
        """Whether both are."""
        return self.first.from_sums and self.second.from_sums

    @property
    def charges(self) -> bool:
        """Whether either works through the router's gradient."""
        return self.first.charges or self.second.charges

    @property
    def prices_selection(self) -> bool:
        """Whether either keeps a selection price."""
        return self.first.prices_selection or self.second.prices_selection

    @property
    def reads(self) -> frozenset[str]:
        """What either reads."""
        return self.first.reads | self.second.reads

    @property
    def coupling(self) -> Coupling:
        """That of the one that couples more."""
        return more_coupled(self.first.coupling, self.second.coupling)

    @property
    def aim(self) -> Proportions | None:
        """That of the first, or else of the second."""
        return self.first.aim or self.second.aim

    @property
    def selects(self) -> bool:
        """Whether either changes which experts are chosen."""
        return self.first.selects or self.second.selects

    def _parts(self, state: Both, batch: Batch) -> tuple[tuple[Method, Any, Batch], ...]:
        sums, step = self._split(batch.sums), self._split(batch.step)
        return (
            (self.first, state.first, batch._replace(sums=sums[0], step=step[0])),
            (self.second, state.second, batch._replace(sums=sums[1], step=step[1])),
        )

    def _split(self, sums: Sums) -> tuple[Sums, Sums]:
        cut = len(self.first.extra_shapes(sums.counts.shape[-1]))
        return sums._replace(extra=sums.extra[:cut]), sums._replace(extra=sums.extra[cut:])


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second
