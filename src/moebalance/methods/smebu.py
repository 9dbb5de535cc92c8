"""SMEBU: a selection price moved by the clamped, centred and smoothed load error.

    v_e = (c_e − c̄) / c̄                              relative excess load of the step
    d_e = λ tanh(κ v_e), centred over the experts     small near balance, at most λ far from it
    w ← β w + (1 − β) d,    price ← price + w         momentum

The sign rule of `loss_free.py` moves every price by its full step for ever. Here the step shrinks
as the load gets even.

Source: Singh et al., 2026, "Arcee Trinity Large Technical Report", arXiv 2602.17004: Soft-clamped
Momentum Expert Bias Updates (their bias b is −price), for 256 experts and sigmoid scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Traits, beyond, check_positive, where_seen
from moebalance.methods.lineage import Lineage
from moebalance.methods.selection import NatsPrice, Selecting, SelectionPrice
from moebalance.proportions import per_proportion
from moebalance.routing import Sums

_SPEED = {"affinity": 5e-4, "nats": 0.01}


class MovingPrice(NamedTuple):
    """The selection price, and its momentum w (E,), float32."""

    held: SelectionPrice | NatsPrice
    momentum: Float[Tensor, "E"]

    @property
    def price(self) -> Float[Tensor, "E"]:
        """The price (E,)."""
        return self.held.price

    def problem(self) -> str:
        """What no run leaves behind; empty if nothing."""
        return beyond("its momentum", self.momentum)

    def inherit(self, lineage: Lineage, gate: Gate) -> MovingPrice:
        """The price follows its parents, and the momentum as a price would."""
        momentum = self.held._replace(price=self.momentum).inherit(lineage, gate).price
        return MovingPrice(self.held.inherit(lineage, gate), momentum)


@dataclass(frozen=True, repr=False)
class SMEBU(Selecting):
    """Soft-clamped momentum updates of a selection price.

    Args:
        speed: λ ≥ 0, the largest step of a price, in units of the scale: 0.0005 of the affinity or
            0.01 nats if not given.
        momentum: β in [0, 1); 0 for none.
        clamp: κ > 0, how soon the clamp is reached: at κ v = 1 the step is 76 % of λ.
        proportions: (E,) positive, target parts of the load; None for equal parts.
        scale: "affinity" or "nats"; see `Selecting`.

    Raises:
        ValueError: a number out of range.

    >>> SMEBU().speed
    0.0005
    """

    speed: float | None = None
    momentum: float = 0.5
    clamp: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speed is None:
            object.__setattr__(self, "speed", _SPEED[self.scale])
        check_positive("speed", self.speed)  # type: ignore[arg-type]
        check_positive("momentum", self.momentum)
        check_positive("clamp", self.clamp, zero=False)
        if self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum!r}: must be below 1, or no price moves.")

    @property
    def traits(self) -> Traits:
        """Counted the fast way."""
        return super().traits._replace(from_sums=True)

    def init(self, num_experts: int) -> MovingPrice:
        """Price and momentum 0 for all experts."""
        held = super().init(num_experts)
        return MovingPrice(held, torch.zeros_like(held.price))

    def adopt(self, state: MovingPrice, price: Float[Tensor, "E"]) -> MovingPrice:
        """Go on from the model's own price, without momentum."""
        return MovingPrice(state.held._replace(price=price), torch.zeros_like(price))

    def priced(self, state: MovingPrice, price: Float[Tensor, "E"]) -> MovingPrice:
        """The state with this price in place of its own; the momentum stays."""
        return state._replace(held=state.held._replace(price=price))

    def update(self, state: MovingPrice, sums: Sums) -> MovingPrice:
        """Move the price by the smoothed error of the step's load."""
        mean = sums.counts.mean(dim=-1, keepdim=True)
        # clamp: an empty step has excess 0, not 0/0; its result is discarded below.
        excess = (per_proportion(sums.counts, self.proportions) - mean) / mean.clamp(min=1e-30)
        step = cast(float, self.speed) * torch.tanh(self.clamp * excess)
        step = step - step.mean(dim=-1, keepdim=True)
        momentum = self.momentum * state.momentum + (1 - self.momentum) * step
        price = where_seen(sums.tokens, state.price + momentum, state.price)
        held = state.held._replace(price=price)
        return MovingPrice(held, where_seen(sums.tokens, momentum, state.momentum))
