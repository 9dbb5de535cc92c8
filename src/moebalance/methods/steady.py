"""A steady selection price: it moves by the clamped error of the expected load.

    m ← m + η (c / Σ c − m)              mean load of some 1/η steps (`ema.py`)
    d_e = tanh(κ (E m_e − 1)), centred   small near balance, at most 1 far from it
    price ← price + λ d

Other rules clamp the error of a single step, or take its sign. A step with a few tokens too many
then weighs as much as a step with a lot, and where each step holds one domain the price comes to
rest at an uneven load. Here the mean comes first, so the price rests where the expected load is
even. It is the expectation that φ-balancing is about, for the hard load.

Source: our own. docs/mathematics.md derives it. The clamp comes from SMEBU (`smebu.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Traits, check_positive, check_rate, where_seen
from moebalance.methods.ema import Ema
from moebalance.methods.lineage import Lineage
from moebalance.methods.selection import NatsPrice, Scale, Selecting, SelectionPrice
from moebalance.proportions import per_proportion
from moebalance.routing import Sums

_SPEED = {"affinity": 5e-4, "nats": 0.01}


class Steady(NamedTuple):
    """The selection price, and the mean load."""

    held: SelectionPrice | NatsPrice
    load: Ema

    @property
    def price(self) -> Float[Tensor, "E"]:
        """The price (E,)."""
        return self.held.price

    def inherit(self, lineage: Lineage, gate: Gate) -> Steady:
        """Price and load follow their parents."""
        return Steady(self.held.inherit(lineage, gate), self.load.inherit(lineage, gate))


@dataclass(frozen=True, repr=False)
class SteadyPrice(Selecting):
    """Move a selection price against the mean load of some steps.

    Args:
        speed: λ ≥ 0, the largest step of a price, in units of the scale: 0.01 nats or 0.0005 of the
            affinity if not given.
        rate: η in (0, 1], the weight of the newest step in the mean load. A smaller one averages
            over more domains, and is later.
        clamp: κ > 0, how soon the clamp is reached: at an excess of 1/κ the step is 76 % of λ.
        proportions: (E,) positive, target parts of the load; None for equal parts.
        scale: "nats", in which a step means the same for any E and any gate; or "affinity", for a
            price that a model's own selection bias can hold. See `Selecting`.

    Raises:
        ValueError: a number out of range.

    >>> SteadyPrice().speed, SteadyPrice(scale="affinity").speed
    (0.01, 0.0005)
    """

    speed: float | None = None
    rate: float = 0.1
    clamp: float = 2.0
    scale: Scale = field(default="nats", kw_only=True)

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
        """Price 0 for all experts, and no load seen."""
        return Steady(super().init(num_experts), Ema.empty(num_experts))

    def priced(self, state: Steady, price: Float[Tensor, "E"]) -> Steady:
        """The state with this price in place of its own; the mean load stays."""
        return state._replace(held=state.held._replace(price=price))

    def update(self, state: Steady, sums: Sums) -> Steady:
        """Take up the step's load, and move the price by the mean."""
        # clamp: an empty step has load 0, not 0/0, and rate 0.
        load = sums.counts / sums.counts.sum(dim=-1, keepdim=True).clamp(min=1)
        mean = state.load.toward(load, self.rate * (sums.tokens > 0).to(load.dtype))
        excess = per_proportion(mean.mean, self.proportions) * load.shape[-1] - 1
        move = torch.tanh(self.clamp * excess)
        move = cast(float, self.speed) * (move - move.mean(dim=-1, keepdim=True))
        price = where_seen(sums.tokens, state.price + move, state.price)
        return Steady(state.held._replace(price=price), mean)
