"""SMEBU: a selection price moved by the clamped, centred and smoothed load error.

    v_e = (c_e − c̄) / c̄                              relative excess load of the step
    d_e = λ tanh(κ v_e), centred over the experts     small near balance, at most λ far from it
    w ← β w + (1 − β) d,    price ← price + w         momentum

The sign rule of `loss_free.py` moves every price by its full step for ever. Here the step shrinks
as the load gets even.

A batch's load also has noise, which is large where experts are many, batches are small or a batch
holds one domain. A price that follows it is late for the next batch. With speed="auto" λ follows
the errors themselves, by the cosine of the step's error and those before it:

    λ ← λ exp(ρ ⟨d, w⟩ / |d| |w|),   λ0/32 ≤ λ ≤ λ0,   ρ = 0.05

Errors that keep their direction say that the price is late; errors that turn say that it follows
noise. Where a price tracks as well as it can, its errors are uncorrelated (Mehra 1970, IEEE Trans.
Autom. Control 15, 175, for the Kalman filter). This part is our own.

Source: Singh et al., 2026, "Arcee Trinity Large Technical Report", arXiv 2602.17004: Soft-clamped
Momentum Expert Bias Updates (their bias b is −price), for 256 experts and sigmoid scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

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
_SLOWEST, _QUICK = 1 / 32, 0.05  # λ/λ0 at least, and ρ

AUTO = "auto"


class MovingPrice(NamedTuple):
    """The selection price, its momentum w (E,), and λ/λ0 (), float32; () for a fixed speed."""

    held: SelectionPrice | NatsPrice
    momentum: Float[Tensor, "E"]
    pace: Float[Tensor, ""] | tuple[()] = ()

    @property
    def price(self) -> Float[Tensor, "E"]:
        """The price (E,)."""
        return self.held.price

    def problem(self) -> str:
        """What no run leaves behind; empty if nothing."""
        found = beyond("its momentum", self.momentum)
        if found or not isinstance(self.pace, Tensor):
            return found
        return beyond("its pace", self.pace, most=1.0, least=_SLOWEST)

    def inherit(self, lineage: Lineage, gate: Gate) -> MovingPrice:
        """The price follows its parents, and the momentum as a price would."""
        momentum = self.held._replace(price=self.momentum).inherit(lineage, gate).price
        return MovingPrice(self.held.inherit(lineage, gate), momentum, self.pace)


@dataclass(frozen=True, repr=False)
class SMEBU(Selecting):
    """Soft-clamped momentum updates of a selection price.

    Args:
        speed: λ ≥ 0, the largest step of a price, in units of the scale: 0.0005 of the affinity or
            0.01 nats if not given. "auto" begins there, and slows down as far as errors are noise.
        momentum: β in [0, 1); 0 for none.
        clamp: κ > 0, how soon the clamp is reached: at κ v = 1 the step is 76 % of λ.
        proportions: (E,) positive, target parts of the load; None for equal parts.
        scale: "affinity" or "nats"; see `Selecting`.

    Raises:
        ValueError: a number out of range.

    >>> SMEBU().speed
    0.0005
    """

    speed: float | Literal["auto"] | None = None
    momentum: float = 0.5
    clamp: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speed is None:
            object.__setattr__(self, "speed", _SPEED[self.scale])
        if isinstance(self.speed, str) and self.speed != AUTO:
            raise ValueError(f"speed={self.speed!r}: must be a number of at least 0, or {AUTO!r}.")
        check_positive("speed", self._fastest)
        check_positive("momentum", self.momentum)
        check_positive("clamp", self.clamp, zero=False)
        if self.momentum >= 1:
            raise ValueError(f"momentum={self.momentum!r}: must be below 1, or no price moves.")

    @property
    def traits(self) -> Traits:
        """Counted the fast way."""
        return super().traits._replace(from_sums=True)

    def init(self, num_experts: int) -> MovingPrice:
        """Price and momentum 0 for all experts, and the full speed."""
        held = super().init(num_experts)
        pace = torch.ones_like(held.price[0]) if self.speed == AUTO else ()
        return MovingPrice(held, torch.zeros_like(held.price), pace)

    def adopt(self, state: MovingPrice, price: Float[Tensor, "E"]) -> MovingPrice:
        """Go on from the model's own price, without momentum."""
        held = state.held._replace(price=price)
        return state._replace(held=held, momentum=torch.zeros_like(price))

    def priced(self, state: MovingPrice, price: Float[Tensor, "E"]) -> MovingPrice:
        """The state with this price in place of its own; the momentum stays."""
        return state._replace(held=state.held._replace(price=price))

    def update(self, state: MovingPrice, sums: Sums) -> MovingPrice:
        """Move the price by the smoothed error of the step's load."""
        mean = sums.counts.mean(dim=-1, keepdim=True)
        # clamp: an empty step has excess 0, not 0/0; its result is discarded below.
        excess = (per_proportion(sums.counts, self.proportions) - mean) / mean.clamp(min=1e-30)
        step = torch.tanh(self.clamp * excess)
        step = self._fastest * (step - step.mean(dim=-1, keepdim=True))
        pace = self._paced(state, step)
        step = step if isinstance(pace, tuple) else pace * step
        momentum = self.momentum * state.momentum + (1 - self.momentum) * step
        price = where_seen(sums.tokens, state.price + momentum, state.price)
        held = state.held._replace(price=price)
        if isinstance(pace, Tensor):
            pace = where_seen(sums.tokens, pace, cast(Tensor, state.pace))
        return MovingPrice(held, where_seen(sums.tokens, momentum, state.momentum), pace)

    def readings(self, state: MovingPrice) -> dict[str, Float[Tensor, ""]]:
        """The spread of a price in nats, and the speed if it is measured."""
        found = super().readings(state)
        if isinstance(state.pace, Tensor):
            found["speed"] = self._fastest * state.pace
        return found

    def _paced(self, state: MovingPrice, step: Float[Tensor, "E"]) -> Float[Tensor, ""] | tuple[()]:
        """λ/λ0 after a step's error; () for a fixed speed."""
        if not isinstance(state.pace, Tensor):
            return ()
        sizes = step.norm(dim=-1) * state.momentum.norm(dim=-1)
        # clamp: no error and no memory have no direction, and the pace stays.
        cosine = (step * state.momentum).sum(dim=-1) / sizes.clamp(min=1e-30)
        pace: Tensor = state.pace * (_QUICK * cosine).exp()
        return pace.clamp(_SLOWEST, 1.0)

    @property
    def _fastest(self) -> float:
        """λ0."""
        return _SPEED[self.scale] if self.speed == AUTO else cast(float, self.speed)
