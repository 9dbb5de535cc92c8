"""A memory whose rate is found from how the loads of steps vary: as long as their noise asks for.

The load of a step is taken as a level that walks, seen through noise,

    x_t = μ_t + ε_t,        μ_t = μ_{t−1} + ν_t,        var ε = R,        var ν = Q,

and an average m ← (1 − η) m + η x of it misses μ by R η / (2 − η) + Q (1 − η)² / (η (2 − η)) in
the mean square: long memories are late, short ones noisy. The least is at

    η² / (1 − η) = Q / R,        η = 2 / (1 + √(1 + 4 R / Q)),

which is also the steady gain of the Kalman filter (Muth 1960, J. Am. Stat. Assoc. 55, 299). What
remains is to measure R and Q. Of two averages of the same x with rates a > b,

    E (m_a − m_b)² · (2 − a)(2 − b)(a + b − ab) / (2 (a − b)²)  =  R + Q · (1 + (1−a)(1−b)) / (2ab),

so two pairs of averages, one fast and one slow, give R and Q by a difference. (Left: noise and walk
contribute to cov(m_a, m_b) ab R / (a + b − ab) and, as misses, (1−a)(1−b) Q / (a + b − ab).)

This reads the autocovariance of the loads at lags of 1/a to 1/c steps. If neighbouring steps come
from one domain, ε has an autocorrelation ρ_k, and the averages see R (1 + 2 Σ ρ_k), the variance
that averaging really has to fight. The lag-1 autocovariance alone would take such noise for a walk,
and forget faster where it should remember longer. Noise that lasts much longer than 1/a = 4 steps
looks like a walk here too.

In tokens the memory comes out the same whatever the batch: with n tokens a step R is r/n and Q is
q·n, hence n / η → √(r/q) where η is small.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.ema import Ema
from moebalance.methods.lineage import Lineage

START = 0.1  # the rate before there is anything to judge by; the default of φ-balancing
SLOWEST, FASTEST = 1 / 256, 0.5  # what can be told from the three averages, and no more
_SCALES = (1 / 4, 1 / 16, 1 / 64)  # in simulation within 25 % for gains of 0.02 to 0.2 (tests)
_EVIDENCE = 1 / 64  # squares are averaged as long as the slowest of them


class Adaptive(NamedTuple):
    """The average that is read, three more at fixed rates, and two mean squares, float32.

    `near` and `far` are R + Q · g of the fast and of the slow pair, in squares of an even share.
    """

    average: Ema
    fast: Ema
    middle: Ema
    slow: Ema
    near: Ema
    far: Ema

    @classmethod
    def empty(cls, num_experts: int) -> "Adaptive":
        """Nothing seen."""
        means = [Ema.empty(num_experts) for _ in range(4)]
        squares = [Ema.empty(num_experts) for _ in range(2)]
        zero = torch.zeros((), dtype=torch.float32)
        return cls(*means, *(Ema(zero, square.weight) for square in squares))

    @property
    def mean(self) -> Float[Tensor, "E"]:
        """The average that is read."""
        return self.average.mean

    @property
    def rate(self) -> Float[Tensor, ""]:
        """η for the next step: the start's at first, then more and more the one that was found."""
        near_gain, far_gain = _gain(*_SCALES[:2]), _gain(*_SCALES[1:])
        tiny = torch.finfo(self.near.mean.dtype).tiny
        walk = ((self.far.mean - self.near.mean) / (far_gain - near_gain)).clamp(min=tiny)
        noise = (self.near.mean - near_gain * walk).clamp(min=0.0)
        best = 2 / (1 + (1 + 4 * noise / walk).sqrt())
        found = best.clamp(SLOWEST, FASTEST).log()
        start = torch.full_like(found, START).log()
        return torch.lerp(start, found, self.near.weight).exp()

    def inherit(self, lineage: Lineage, gate: Gate) -> "Adaptive":
        """Means follow the experts; noise and walk, in even shares, are the layer's."""
        return self._replace(
            average=self.average.inherit(lineage, gate),
            fast=self.fast.inherit(lineage, gate),
            middle=self.middle.inherit(lineage, gate),
            slow=self.slow.inherit(lineage, gate),
        )

    def after(self, value: Float[Tensor, "E"], seen: Float[Tensor, ""]) -> "Adaptive":
        """Advance by a step's load; nothing changes where `seen` is 0 instead of 1."""
        emas = (self.fast, self.middle, self.slow)
        fast, middle, slow = (
            ema.toward(value, seen * rate) for ema, rate in zip(emas, _SCALES, strict=True)
        )
        near, far = _square(fast, middle, *_SCALES[:2]), _square(middle, slow, *_SCALES[1:])
        return Adaptive(
            self.average.toward(value, seen * self.rate),
            fast,
            middle,
            slow,
            self.near.toward(near, seen * _EVIDENCE),
            self.far.toward(far, seen * _EVIDENCE),
        )


def _gain(a: float, b: float) -> float:
    """What Q is multiplied by in the square of a pair."""
    return (1 + (1 - a) * (1 - b)) / (2 * a * b)


def _square(first: Ema, second: Ema, a: float, b: float) -> Float[Tensor, ""]:
    """R + g Q as one step shows it, mean over experts, in squares of an even share."""
    num_experts = first.mean.shape[-1]
    apart = (num_experts * (first.mean - second.mean)).square().mean(dim=-1)
    return apart * ((2 - a) * (2 - b) * (a + b - a * b) / (2 * (a - b) ** 2))
