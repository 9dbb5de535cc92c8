"""Loss-free balancing: a selection price that rises with an expert's load.

    choose by s − price, weight by s;        price_e ← price_e + u · sign(c_e − mean c)

once per optimizer step, with c the assignment counts of the whole step. With proportions ρ the mean
is replaced by ρ_e Σ_j c_j.

Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
arXiv 2408.15664, Algorithm 1 (their bias b is −price) and its proportional variant in the ablation.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from moebalance.methods.base import Traits, check_positive, where_seen
from moebalance.methods.selection import Selecting, SelectionPrice
from moebalance.proportions import Proportions, per_proportion, settle_proportions
from moebalance.routing import Sums


@dataclass(frozen=True, repr=False)
class LossFree(Selecting):
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

    @property
    def traits(self) -> Traits:
        """The update reads the hard load."""
        return super().traits._replace(from_sums=True, shared=frozenset({"counts"}))

    def update(self, state: SelectionPrice, sums: Sums) -> SelectionPrice:
        """Raise the price of experts above their part of the load, lower the others."""
        mean = sums.counts.mean(dim=-1, keepdim=True)
        # Of counts per proportion, whose sign and relative size are those of c_e − ρ_e Σ c.
        excess = per_proportion(sums.counts, self.proportions) - mean
        # clamp: in an empty step 0 / 0 would be NaN.
        move = torch.sign(excess) if self.rule == "sign" else excess / mean.clamp(min=1e-30)
        price = state.price + self.speed * move
        if self.recentre:
            price = price - price.mean(dim=-1, keepdim=True)
        return SelectionPrice(where_seen(sums.tokens, price, state.price))
