"""What every method with a selection price shares: the price is its state, and starts at 0."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Method
from moebalance.methods.lineage import Lineage
from moebalance.proportions import check_proportions


class SelectionPrice(NamedTuple):
    """The price (E,), float32, subtracted from the affinities before top-k."""

    price: Float[Tensor, "E"]

    def inherit(self, lineage: Lineage, gate: Gate) -> "SelectionPrice":
        """The parent's price, in the unit of affinities."""
        return SelectionPrice(inherited_price(self.price, lineage, gate))


class Selecting(Method):
    """Base of the methods that keep one price and subtract it before top-k.

    A subclass adds `update`. Its state has the field `price`, and may have more.
    """

    def init(self, num_experts: int) -> Any:
        """Start with price 0 for all experts."""
        check_proportions(self.traits.aim, num_experts)
        return SelectionPrice(torch.zeros(num_experts, dtype=torch.float32))

    def selection_price(self, state: Any) -> Float[Tensor, "E"]:
        """The price as it stands."""
        price: Tensor = state.price
        return price

    def adopt(self, state: Any, price: Float[Tensor, "E"]) -> Any:
        """Go on from the model's own price."""
        return state._replace(price=price)


def inherited_price(
    price: Float[Tensor, "old"], lineage: Lineage, gate: Gate
) -> Float[Tensor, "new"]:
    """The parents' price in the unit of the new layer's affinities.

    Softmax affinities share a sum of one: with n times the experts they are an n-th each.
    """
    price = lineage.price(price)
    if gate.sums_to_one:
        price = price * (lineage.num_parents / lineage.num_experts)
    return price
