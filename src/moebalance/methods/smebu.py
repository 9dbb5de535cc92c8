"""SMEBU: a selection price moved by the clamped, centred and smoothed load error.

    v_e = (c_e − c̄) / c̄                              relative excess load of the step
    d_e = λ tanh(κ v_e), centred over the experts     small near balance, at most λ far from it
    w ← β w + (1 − β) d,    price ← price + w         momentum

The sign rule of `loss_free.py` moves every price by its full step for ever. Here the step shrinks
as the load gets even.

Source: Singh et al., 2026, "Arcee Trinity Large Technical Report", arXiv 2602.17004: Soft-clamped
Momentum Expert Bias Updates (their bias b is −price), for 256 experts and sigmoid scores.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Traits, check_positive, where_seen
from moebalance.methods.lineage import Lineage
from moebalance.methods.selection import Selecting, inherited_price
from moebalance.proportions import Proportions, per_proportion, settle_proportions
from moebalance.routing import Sums


class MovingPrice(NamedTuple):
    """The selection price (E,) and its momentum w (E,), float32."""

    price: Float[Tensor, "E"]
    momentum: Float[Tensor, "E"]

    def inherit(self, lineage: Lineage, gate: Gate) -> "MovingPrice":
        """Both follow the parents, in the unit of affinities."""
        return MovingPrice(*(inherited_price(part, lineage, gate) for part in self))


@dataclass(frozen=True, repr=False)
class SMEBU(Selecting):
    """Soft-clamped momentum updates of a selection price.

    Args:
        speed: λ ≥ 0, the largest step of a price, in units of the affinity.
        momentum: β in [0, 1); 0 for none.
        clamp: κ > 0, how soon the clamp is reached: at κ v = 1 the step is 76 % of λ.
        proportions: (E,) positive, the part of the load of each expert; None for equal parts.

    Raises:
        ValueError: a number out of range.

    >>> SMEBU().speed
    0.0005
    """

    speed: float = 5e-4
    momentum: float = 0.5
    clamp: float = 2.0
    proportions: Proportions | None = None

    def __post_init__(self) -> None:
        check_positive("speed", self.speed)
        check_positive("momentum", self.momentum)
        check_positive("clamp", self.clamp, zero=False)
        settle_proportions(self)
        if self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum!r}: must be below 1, or no price moves.")

    @property
    def traits(self) -> Traits:
        """The update reads the hard load."""
        return super().traits._replace(from_sums=True, shared=frozenset({"counts"}))

    def init(self, num_experts: int) -> MovingPrice:
        """Price and momentum 0 for all experts."""
        price = super().init(num_experts).price
        return MovingPrice(price, torch.zeros_like(price))

    def update(self, state: MovingPrice, sums: Sums) -> MovingPrice:
        """Move the price by the smoothed error of the step's load."""
        mean = sums.counts.mean(dim=-1, keepdim=True)
        # clamp: an empty step has excess 0, not 0/0; its result is discarded below.
        excess = (per_proportion(sums.counts, self.proportions) - mean) / mean.clamp(min=1e-30)
        step = self.speed * torch.tanh(self.clamp * excess)
        step = step - step.mean(dim=-1, keepdim=True)
        momentum = self.momentum * state.momentum + (1 - self.momentum) * step
        return MovingPrice(
            where_seen(sums.tokens, state.price + momentum, state.price),
            where_seen(sums.tokens, momentum, state.momentum),
        )
