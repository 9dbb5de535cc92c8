"""Loss-free balancing: a selection price that rises with an expert's load.

    choose by s − price, weight by s;        price_e ← price_e + u · sign(c_e − mean c)

once per optimizer step, c the assignment counts of the whole step; with shares ρ, ρ_e Σ_j c_j in
place of the mean. Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for
Mixture-of-Experts", arXiv 2408.15664, Algorithm 1 (their bias b is −price) and its proportional
variant in the ablation.
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

        Softmax affinities share a sum of one: with n times the experts they are an n-th each.
        """
        price = lineage.price(self.price)
        if gate.sums_to_one:
            price = price * (lineage.num_parents / lineage.num_experts)
        return SelectionPrice(price)


@dataclass(frozen=True, repr=False)
class LossFree(Method):
    """Move each expert's selection price against its load, outside the gradient.

    Args:
        speed: u ≥ 0, price step in units of the affinity (softmax probability or sigmoid). Softmax
            affinities are 1/E in the mean: beside many experts the default may make loads swing.
        rule: "sign" moves by ±u; "proportional" by u times the relative excess c_e / mean c − 1.
        recentre: keep the prices' mean at 0, so that they cannot drift together.
        proportions: (E,) positive, the part of the load of each expert; None for equal parts.
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
        """Start with price 0 for all."""
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
        """Raise the price of experts above their part of the load, lower it below."""
        mean = sums.counts.mean(dim=-1, keepdim=True)
        # Of counts per share, whose sign and relative size are those of c_e − ρ_e Σ c.
        excess = per_proportion(sums.counts, self.proportions) - mean
        # clamp: an empty step has excess 0, not 0/0.
        move = torch.sign(excess) if self.rule == "sign" else excess / mean.clamp(min=1e-30)
        price = state.price + self.speed * move
        if self.recentre:
            price = price - price.mean(dim=-1, keepdim=True)
        return SelectionPrice(where_seen(sums.tokens, price, state.price))

    def price(self, state: SelectionPrice) -> Float[Tensor, "E"]:
        """The price as it stands."""
        return state.price

    def adopt(self, state: SelectionPrice, price: Float[Tensor, "E"]) -> SelectionPrice:
        """Go on from the model's own price."""
        return SelectionPrice(price)
