"""What every method with a selection price shares: where the price lives and how it acts.

    scale="affinity"    top-k ranks  a − price          a model's own selection bias is −price
    scale="nats"        top-k ranks  log a − price      a step means the same for any E and any gate

Softmax affinities are 1/E in the mean, so a step of 0.001 is large for 384 experts and small for 8.
In nats a price of 0.1 is a factor e^−0.1 on the affinity, whatever its size. It is no additive
bias, so no bias of the model can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Method, State, Traits, beyond
from moebalance.methods.lineage import Lineage
from moebalance.metrics.load import price_spread
from moebalance.proportions import Proportions, check_proportions, settle_proportions

Scale = Literal["affinity", "nats"]


class SelectionPrice(NamedTuple):
    """The price (E,), float32, subtracted before top-k, in units of the affinity."""

    price: Float[Tensor, "E"]

    def inherit(self, lineage: Lineage, gate: Gate) -> SelectionPrice:
        """The parents' price in the unit of the new layer's affinities."""
        return SelectionPrice(inherited_price(self.price, lineage, gate))


class NatsPrice(NamedTuple):
    """The price (E,), float32, subtracted from the log-affinities before top-k."""

    price: Float[Tensor, "E"]

    def problem(self) -> str:
        """What no run leaves behind; empty if nothing."""
        return beyond("its price in nats", self.price)

    def inherit(self, lineage: Lineage, gate: Gate) -> NatsPrice:
        """The parents' price; its unit does not depend on the number of experts."""
        return NatsPrice(lineage.price(self.price))


@dataclass(frozen=True, repr=False)
class Selecting(Method):
    """Base of the methods that keep one price and subtract it before top-k.

    A subclass adds `update`. Its state has the field `price`, and may have more.

    Args:
        proportions: (E,) positive, target parts of the load; None for equal parts.
        scale: "affinity" to subtract the price from the affinities, as a model's own selection
            bias does; "nats" to subtract it from their logarithms.

    Raises:
        ValueError: no such scale, or proportions out of range.
    """

    proportions: Proportions | None = field(default=None, kw_only=True)
    scale: Scale = field(default="affinity", kw_only=True)

    def __post_init__(self) -> None:
        settle_proportions(self)
        if self.scale not in ("affinity", "nats"):
            raise ValueError(f"scale={self.scale!r}: must be 'affinity' or 'nats'.")

    @property
    def traits(self) -> Traits:
        """The update reads the hard load. A price in nats fits no bias of a model."""
        return super().traits._replace(
            shared=frozenset({"counts"}), has_selection_price=self.scale == "affinity"
        )

    def init(self, num_experts: int) -> Any:
        """Start with price 0 for all experts."""
        check_proportions(self.proportions, num_experts)
        zero = torch.zeros(num_experts, dtype=torch.float32)
        return SelectionPrice(zero) if self.scale == "affinity" else NatsPrice(zero)

    def selection_price(self, state: State) -> Float[Tensor, "E"] | None:
        """The price in units of the affinity; None for a price in nats."""
        if self.scale == "nats":
            return None
        price: Tensor = state.price
        return price

    def price_in_nats(self, state: State) -> Float[Tensor, "E"] | None:
        """The price in nats; None for a price in units of the affinity."""
        if self.scale == "affinity":
            return None
        price: Tensor = state.price
        return price

    def priceable(self, gate: Gate, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The scores from which the price is subtracted."""
        return gate.affinities(logits) if self.scale == "affinity" else gate.log_affinity(logits)

    def held(self, before: State, after: State) -> State:
        """The price stays: it had no effect on the choice, so that nothing would stop it."""
        return before

    def adopt(self, state: State, price: Float[Tensor, "E"]) -> State:
        """Go on from the model's own price."""
        return self.priced(state, price)

    def priced(self, state: State, price: Float[Tensor, "E"]) -> State:
        """The state with this price in place of its own."""
        return state._replace(price=price)

    def readings(self, state: State) -> dict[str, Float[Tensor, ""]]:
        """The spread of a price in nats; a price in affinities is logged as the layer's own."""
        return {} if self.scale == "affinity" else {"price_nats": price_spread(state.price)}


def inherited_price(
    price: Float[Tensor, "old"], lineage: Lineage, gate: Gate
) -> Float[Tensor, "new"]:
    """The parents' price in the unit of the new layer's affinities.

    Softmax affinities sum to one: with n times the experts they are an n-th each.
    """
    price = lineage.price(price)
    if gate.sums_to_one:
        price = price * (lineage.num_parents / lineage.num_experts)
    return price
