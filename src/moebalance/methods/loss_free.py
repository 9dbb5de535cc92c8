"""Loss-free balancing: a selection price that rises with an expert's load.

    choose by a − price, weight by a
    price_e ← price_e + u · sign(c_e − mean c)           rule="sign"
    price_e ← price_e + u · (c_e / mean c − 1)           rule="proportional"

once per optimizer step. c (E,) are the assignment counts of the whole step. With proportions ρ,
ρ_e Σ_j c_j replaces the mean.

The proportional rule is a subgradient step on the dual of the balanced assignment, so its price
settles where the *expected* load is even. A sign is not linear in the load: its price settles where
the load is above its part as often as below. Where each step holds one domain, that is another load
(docs/mathematics.md). In affinities the published rule is the default. In nats, where one speed
suits every gate, the proportional one is.

Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
arXiv 2408.15664, Algorithm 1 (their bias b is −price), and the proportional variant in its
ablation. The scale in nats is our own.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch

from moebalance.methods.base import State, Traits, check_positive, where_seen
from moebalance.methods.selection import Selecting
from moebalance.proportions import per_proportion
from moebalance.routing import Sums

_SPEED = {
    ("affinity", "sign"): 0.001,
    ("affinity", "proportional"): 0.001,
    ("nats", "sign"): 0.02,
    ("nats", "proportional"): 0.01,
}


@dataclass(frozen=True, repr=False)
class LossFree(Selecting):
    """Move each expert's selection price against its load, outside the gradient.

    Args:
        speed: u ≥ 0, step of a price, in units of the scale: 0.001 of the affinity (softmax
            probability or sigmoid), or 0.01 nats (0.02 by the sign), if not given. Softmax
            affinities are 1/E in the mean: with many experts 0.001 may make loads swing, and nats
            do not.
        rule: "sign" moves by ±u; "proportional" by u times the relative excess c_e / mean c − 1.
            If not given, "sign" in affinities, as published, and "proportional" in nats.
        recentre: keep the mean of the prices at 0; if not given, for a price in nats. Without it
            the sign rule moves the mean too, which changes no choice but makes prices large.
        proportions: (E,) positive, target parts of the load; None for equal parts.
        scale: "affinity" or "nats"; see `Selecting`.

    Raises:
        ValueError: speed, rule, scale or proportions out of range.

    >>> LossFree()
    LossFree(scale='affinity', speed=0.001, rule='sign', recentre=False)
    >>> LossFree(scale="nats")
    LossFree(scale='nats', speed=0.01, rule='proportional', recentre=True)
    """

    speed: float | None = None
    rule: Literal["sign", "proportional"] | None = None
    recentre: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is None:
            object.__setattr__(self, "rule", "sign" if self.scale == "affinity" else "proportional")
        if self.rule not in ("sign", "proportional"):
            raise ValueError(f"rule={self.rule!r}: must be 'sign' or 'proportional'.")
        if self.speed is None:
            object.__setattr__(self, "speed", _SPEED[self.scale, self.rule])
        if self.recentre is None:
            object.__setattr__(self, "recentre", self.scale == "nats")
        check_positive("speed", self.speed)  # type: ignore[arg-type]

    @property
    def traits(self) -> Traits:
        """Counted the fast way."""
        return super().traits._replace(from_sums=True)

    def update(self, state: State, sums: Sums) -> State:
        """Raise the price of experts above their part of the load, lower the others."""
        mean = sums.counts.mean(dim=-1, keepdim=True)
        # c_e / (E ρ_e) − mean c has the sign and the relative size of c_e − ρ_e Σ c.
        excess = per_proportion(sums.counts, self.proportions) - mean
        # clamp: in an empty step 0 / 0 would be NaN.
        move = torch.sign(excess) if self.rule == "sign" else excess / mean.clamp(min=1e-30)
        price = state.price + cast(float, self.speed) * move
        if self.recentre:
            price = price - price.mean(dim=-1, keepdim=True)
        return state._replace(price=where_seen(sums.tokens, price, state.price))
