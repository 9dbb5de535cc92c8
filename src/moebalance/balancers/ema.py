"""An exponential moving average that knows how much it has seen.

    m ← (1 − η) m + η x,        w ← (1 − η) w + η,        m₀ = 0, w₀ = 0,

read as m / w, the bias-corrected mean (Kingma & Ba, 2015, §3). For negative entropy the price
∇φ(m / w) differs from the paper's ∇φ(m) by the constant log w, which no gradient sees; for the
other potentials the correction removes a warm-up that a zero start would add.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Ema(NamedTuple):
    """Running mean over steps: `mean` (E,) and its accumulated `weight` (), float32."""

    mean: Float[Tensor, "E"]
    weight: Float[Tensor, ""]

    @classmethod
    def empty(cls, num_experts: int) -> "Ema":
        """Start from nothing."""
        return cls(
            torch.zeros(num_experts, dtype=torch.float32), torch.zeros((), dtype=torch.float32)
        )

    def toward(
        self, value: Float[Tensor, "E"], rate: float | Tensor, tokens: Float[Tensor, ""]
    ) -> "Ema":
        """Move by `rate` toward `value`; stay where no token was seen."""
        rate = ((tokens > 0).to(self.mean.dtype) * rate).to(self.mean.dtype)
        return Ema(
            torch.lerp(self.mean, value.to(self.mean.dtype), rate),
            torch.lerp(self.weight, torch.ones_like(self.weight), rate),
        )

    def read(self) -> Float[Tensor, "E"]:
        """The bias-corrected mean; uniform before the first step."""
        uniform = torch.full_like(self.mean, 1 / self.mean.shape[-1])
        # clamp: the unused branch of `where` must not divide by 0.
        return torch.where(
            self.weight > 0,
            self.mean / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny),
            uniform,
        )
