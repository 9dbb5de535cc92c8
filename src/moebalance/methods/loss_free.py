"""Loss-free balancing: a selection price that rises with an expert's load.

    choose by s − price, weight by s;        price_e ← price_e + u · sign(c_e − mean c)

once per optimizer step. c (E,) are the assignment counts of the whole step. With proportions ρ,
ρ_e Σ_j c_j replaces the mean. Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing
Strategy for Mixture-of-Experts", arXiv 2408.15664, Algorithm 1 (their bias b is −price), and the
proportional variant in its ablation.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Method, check_positive, where_seen
from moebalance.methods.lineage import Lineage
from moebalance.proportions import (
    Proportions,
    check_proportions,
    per_proportion,
    settle_proportions,
)
from moebalance.routing import Sums


class SelectionPrice(NamedTuple):
    """The price (E,), float32, subtracted from the affinities before top-k."""

    price: Float[Tensor, "E"]

    def inherit(self, lineage: Lineage, gate: Gate) -> "SelectionPrice":
        """The parent's price, in the unit of affinities.

        Softmax affinities sum to one, so n times as many experts have affinities and prices of 1/n.
        """
        price = lineage.price(self.price)
        if gate.sums_to_one:
            price = price * (lineage.num_parents / lineage.num_experts)
        return SelectionPrice(price)


@dataclass(frozen=True, repr=False)
class LossFree(Method):
    """Move each expert's selection price against its load, outside the gradient.

    Args:
        speed: u ≥ 0, price step, in the unit of affinities (softmax probabilities or sigmoids).
            Softmax affinities are 1/E on average: with many experts the default may make the load
            swing.
        rule: "sign" moves by ±u; "proportional" by u times the relative excess c_e / mean c − 1.
        recentre: keep the prices' mean at 0, so that they cannot drift together.
        proportions: (E,) positive, target parts of the load; None for equal parts.

    Raises:
        ValueError: speed, rule or proportions out of range.
    """

    speed: float = 1e-3
    rule: Literal["sign", "proportional"] = "sign"
    recentre: bool = False
    proportions: Proportions | None = None

    def __post_init__(self) -> None:
        check_positive("speed", self.speed)
        settle_proportions(self)
        if self.rule not in ("sign", "proportional"):
            raise ValueError(f"rule={self.rule!r}: must be 'sign' or 'proportional'.")

    def init(self, num_experts: int) -> SelectionPrice:
        """Price 0 for all experts."""
        check_proportions(self.proportions, num_experts)
        return SelectionPrice(torch.zeros(num_experts, dtype=torch.float32))

    @property
    def from_sums(self) -> bool:
        """Yes."""
        return True

    @property
    def reads(self) -> frozenset[str]:
        """The hard load."""
        return frozenset({"counts"})

    def update(self, state: SelectionPrice, sums: Sums) -> SelectionPrice:
        """Raise the price of experts above their part of the load, lower the others."""
        mean = sums.counts.mean(dim=-1, keepdim=True)
        # c_e / (E ρ_e) − mean c has the sign and the relative size of c_e − ρ_e Σ c.
        excess = per_proportion(sums.counts, self.proportions) - mean
        # clamp: in an empty step 0 / 0 would be NaN.
        move = torch.sign(excess) if self.rule == "sign" else excess / mean.clamp(min=1e-30)
        price = state.price + self.speed * move
        if self.recentre:
            price = price - price.mean(dim=-1, keepdim=True)
        return SelectionPrice(where_seen(sums.tokens, price, state.price))

    def price(self, state: SelectionPrice) -> Float[Tensor, "E"]:
        """The price as it stands."""
        return state.price

    def adopt(self, state: SelectionPrice, price: Float[Tensor, "E"]) -> SelectionPrice:
        """Continue from the model's own price."""
        return SelectionPrice(price)
