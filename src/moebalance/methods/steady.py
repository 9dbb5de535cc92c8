"""A steady selection price: it moves by the expected load, as fast as errors last.

    m ← m + η (c / Σ c − m)              mean load of some 1/η steps (`ema.py`)
    d_e = tanh(κ (E m_e − 1)), centred   small near balance, at most 1 far from it
    price ← price + λ s d

Other rules clamp, or take the sign of, the error of one step. Where each step holds one domain, a
clamped error is zero in the mean at another load than an even one: it weighs a step with a few
tokens too many as much as a step with many. Here the mean comes first, so the price comes to rest
where the expected load is even. This is the expectation that φ-balancing is about, for the hard
load.

What is left is noise, which the price follows a little. s slows it down, by the cosine of a step's
error and the mean of those before it:

    s ← s exp(ρ ⟨d(c / Σ c), d(m)⟩ / |d(c / Σ c)| |d(m)|),   1/32 ≤ s ≤ 1,   ρ = 0.05

Errors that keep their direction say that the price is late; errors that turn say that it follows
noise. Where a price tracks as well as it can, its errors are uncorrelated (Mehra 1970, IEEE Trans.
Autom. Control 15, 175, for the Kalman filter).

Source: our own; the clamp is that of `smebu.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Traits, beyond, check_positive, check_rate, where_seen
from moebalance.methods.ema import Ema
from moebalance.methods.lineage import Lineage
from moebalance.methods.selection import NatsPrice, Selecting, SelectionPrice
from moebalance.proportions import per_proportion
from moebalance.routing import Sums

_SPEED = {"affinity": 5e-4, "nats": 0.01}
_SLOWEST, _QUICK = 1 / 32, 0.05


class Steady(NamedTuple):
    """The selection price, the mean load, and the pace s (), float32."""

    held: SelectionPrice | NatsPrice
    load: Ema
    pace: Float[Tensor, ""]

    @property
    def price(self) -> Float[Tensor, "E"]:
        """The price (E,)."""
        return self.held.price

    def problem(self) -> str:
        """What no run leaves behind; empty if nothing."""
        return beyond("its pace", self.pace, most=1.0, least=_SLOWEST)

    def inherit(self, lineage: Lineage, gate: Gate) -> Steady:
        """Price and load follow their parents; the pace begins anew."""
        pace = torch.ones_like(self.pace)
        return Steady(self.held.inherit(lineage, gate), self.load.inherit(lineage, gate), pace)


@dataclass(frozen=True, repr=False)
class SteadyPrice(Selecting):
    """Move a selection price against the mean load of some steps.

    Args:
        speed: λ ≥ 0, the largest step of a price, in units of the scale: 0.01 nats or 0.0005 of the
            affinity if not given.
        rate: η in (0, 1], the weight of the newest step in the mean load.
        clamp: κ > 0, how soon the clamp is reached: at an excess of 1/κ the step is 76 % of λ.
        proportions: (E,) positive, target parts of the load; None for equal parts.
        scale: "affinity" or "nats"; see `Selecting`.

    Raises:
        ValueError: a number out of range.

    >>> SteadyPrice().speed
    0.01
    """

    speed: float | None = None
    rate: float = 0.1
    clamp: float = 2.0
    settle: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.speed is None:
            object.__setattr__(self, "speed", _SPEED[self.scale])
        check_positive("speed", self.speed)  # type: ignore[arg-type]
        check_rate("rate", self.rate)
        check_positive("clamp", self.clamp, zero=False)

    @property
    def traits(self) -> Traits:
        """Counted the fast way."""
        return super().traits._replace(from_sums=True)

    def init(self, num_experts: int) -> Steady:
        """Price 0 for all experts, no load seen, full speed."""
        held = super().init(num_experts)
        return Steady(held, Ema.empty(num_experts), torch.ones_like(held.price[0]))

    def priced(self, state: Steady, price: Float[Tensor, "E"]) -> Steady:
        """The state with this price in place of its own; the mean load stays."""
        return state._replace(held=state.held._replace(price=price))

    def update(self, state: Steady, sums: Sums) -> Steady:
        """Take up the step's load, and move the price by the mean."""
        # clamp: an empty step has load 0, not 0/0; its result is discarded below.
        load = sums.counts / sums.counts.sum(dim=-1, keepdim=True).clamp(min=1)
        seen = (sums.tokens > 0).to(load.dtype)
        mean = state.load.toward(load, self.rate * seen)
        now, before = self._direction(load), self._direction(state.load.mean)
        sizes = now.norm(dim=-1) * before.norm(dim=-1)
        # clamp: an even load has no direction, and the pace stays.
        cosine = (now * before).sum(dim=-1) / sizes.clamp(min=1e-30)
        pace = (state.pace * (_QUICK * seen * cosine).exp()).clamp(_SLOWEST, 1.0)
        if not self.settle:
            pace = state.pace
        move = cast(float, self.speed) * pace * self._direction(mean.mean)
        price = where_seen(sums.tokens, state.price + move, state.price)
        return Steady(state.held._replace(price=price), mean, pace)

    def readings(self, state: Steady) -> dict[str, Float[Tensor, ""]]:
        """The spread of a price in nats, and the speed in force."""
        return super().readings(state) | {"speed": cast(float, self.speed) * state.pace}

    def _direction(self, load: Float[Tensor, "E"]) -> Float[Tensor, "E"]:
        """d of a load (E,) that sums to 1."""
        excess = per_proportion(load, self.proportions) * load.shape[-1] - 1
        clamped = torch.tanh(self.clamp * excess)
        return clamped - clamped.mean(dim=-1, keepdim=True)
