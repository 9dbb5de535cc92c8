"""An exponential moving average, corrected for how much it has seen.

    w ← (1 − η) w + η,        m ← m + (η / w) (x − m),        w₀ = 0.

m is the average m ← (1 − η) m + η x with m₀ = 0, divided by its weight w (Kingma & Ba, 2015, §3).
For negative entropy the prices of both differ by the constant log w, which changes no gradient. For
the other potentials the division removes the warm-up that a start at zero would cause.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import beyond
from moebalance.methods.lineage import Lineage
from moebalance.routing import as_number


class Ema(NamedTuple):
    """Mean over the steps seen, of a load (E,) that sums to 1 or of a square (), and its weight w.

    `mean` (E,) or () and `weight` () are float32.
    """

    mean: Float[Tensor, "*E"]
    weight: Float[Tensor, ""]

    @classmethod
    def empty(cls, num_experts: int) -> Ema:
        """Nothing seen: the mean is uniform until the first step replaces it."""
        uniform = torch.full((num_experts,), 1 / num_experts, dtype=torch.float32)
        # The smallest weight, not 0: an empty step then has a gain of 0 instead of 0/0.
        return cls(uniform, torch.full((), _TINY, dtype=torch.float32))

    def toward(self, value: Float[Tensor, "*E"], rate: float | Tensor) -> Ema:
        """Move by `rate` toward `value` (E,) or (); a rate of 0 changes nothing."""
        weight = (self.weight + rate * (1 - self.weight)).to(self.weight.dtype)
        gain = (rate / weight).to(self.mean.dtype)
        return Ema(torch.lerp(self.mean, value.to(self.mean.dtype), gain), weight)

    def peek(self, value: Float[Tensor, "E"], rate: float | Tensor) -> Float[Tensor, "E"]:
        """The mean of `toward`, in as few kernels as can be."""
        weight = as_number(self.weight)
        gain = rate / (weight + rate * (1 - weight))
        return torch.lerp(self.mean, value.to(self.mean.dtype), gain)

    def problem(self) -> str:
        """What no averaging leaves behind; empty if nothing."""
        found = beyond("its mean", self.mean, most=_ABOVE if self.mean.dim() else 1e15, least=-_OFF)
        total = self.mean.sum().item() if self.mean.dim() else 1.0
        if not found and not 1 - _OFF < total < 1 + _OFF:
            found = f"its mean load adds up to {total:.3g}, and must add up to 1"
        return found or beyond("its weight", self.weight, most=_ABOVE, least=0.0)

    def inherit(self, lineage: Lineage, gate: Gate) -> Ema:
        """The mean follows as a mass; an empty average stays empty."""
        if self.weight <= _TINY:
            return Ema(
                torch.full_like(lineage.mass(self.mean), 1 / lineage.num_experts), self.weight
            )
        return Ema(lineage.mass(self.mean), self.weight)


_OFF = 1e-2  # more than a long run's rounding
_ABOVE = 1 + _OFF
_TINY = torch.finfo(torch.float32).tiny
