"""A moving average that measures its own rate from how the load varies between steps.

The load x_t of step t is modelled as a level μ that walks, plus noise:

    x_t = μ_t + ε_t,        μ_t = μ_{t−1} + ν_t,        var ε = R,        var ν = Q.

An average m ← (1 − η) m + η x has the mean square error R η / (2 − η) + Q (1 − η)² / (η (2 − η)):
a long memory is late, a short one is noisy. The error is least at

    η² / (1 − η) = Q / R,        η = 2 / (1 + √(1 + 4 R / Q)).

This is also the steady gain of the Kalman filter (Muth 1960, J. Am. Stat. Assoc. 55, 299). R and Q
are measured. Two averages of the same x with rates a > b have

    E (m_a − m_b)² · (2 − a)(2 − b)(a + b − ab) / (2 (a − b)²)  =  R + Q · (1 + (1−a)(1−b)) / (2ab).

One fast and one slow pair give R and Q by a difference. To derive the left side: cov(m_a, m_b) of
the noise is ab R / (a + b − ab), and the covariance of the errors that the walk causes is
(1−a)(1−b) Q / (a + b − ab).

Noise with memory. If neighbouring steps come from one domain, ε has an autocorrelation ρ_k. The
averages then see R (1 + 2 Σ ρ_k), and this is the variance that averaging has to reduce. The
autocovariance at lag 1 alone would take such noise for a walk, and shorten the memory where it
should be longer. Noise that lasts much longer than 1/a = 4 steps still looks like a walk.

The memory in tokens does not depend on the batch size: with n tokens a step R is r/n and Q is q·n,
hence n / η → √(r/q) for small η.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.ema import Ema
from moebalance.methods.lineage import Lineage

START = 0.1  # the rate before anything is measured; the default of φ-balancing
SLOWEST, FASTEST = 1 / 256, 0.5  # the range that the three averages can resolve
_SCALES = (1 / 4, 1 / 16, 1 / 64)  # in simulation within 25 % for gains of 0.02 to 0.2 (tests)
_EVIDENCE = 1 / 64  # squares are averaged as long as the slowest average


class Adaptive(NamedTuple):
    """The average that prices use, three more with fixed rates, and two mean squares; float32.

    `near` is R + Q · g of the fast pair, `far` of the slow pair, in squares of an even load.
    """

    average: Ema
    fast: Ema
    middle: Ema
    slow: Ema
    near: Ema
    far: Ema

    @classmethod
    def empty(cls, num_experts: int) -> Adaptive:
        """A memory that has seen nothing."""
        means = [Ema.empty(num_experts) for _ in range(4)]
        squares = [Ema.empty(num_experts) for _ in range(2)]
        zero = torch.zeros((), dtype=torch.float32)
        return cls(*means, *(Ema(zero, square.weight) for square in squares))

    @property
    def mean(self) -> Float[Tensor, "E"]:
        """Mean load (E,), for prices."""
        return self.average.mean

    @property
    def rate(self) -> Float[Tensor, ""]:
        """η for the next step: `START` at first, then more and more the measured rate."""
        near_gain, far_gain = _gain(*_SCALES[:2]), _gain(*_SCALES[1:])
        tiny = torch.finfo(self.near.mean.dtype).tiny
        walk = ((self.far.mean - self.near.mean) / (far_gain - near_gain)).clamp(min=tiny)
        noise = (self.near.mean - near_gain * walk).clamp(min=0.0)
        best = 2 / (1 + (1 + 4 * noise / walk).sqrt())
        found = best.clamp(SLOWEST, FASTEST).log()
        start = torch.full_like(found, START).log()
        return torch.lerp(start, found, self.near.weight).exp()

    def inherit(self, lineage: Lineage, gate: Gate) -> Adaptive:
        """The means follow the experts; noise and walk belong to the layer and stay."""
        return self._replace(
            average=self.average.inherit(lineage, gate),
            fast=self.fast.inherit(lineage, gate),
            middle=self.middle.inherit(lineage, gate),
            slow=self.slow.inherit(lineage, gate),
        )

    def after(self, value: Float[Tensor, "E"], seen: Float[Tensor, ""]) -> Adaptive:
        """Advance by a step's load (E,). Nothing changes if `seen` is 0 instead of 1."""
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
    """Factor of Q in the square of a pair."""
    return (1 + (1 - a) * (1 - b)) / (2 * a * b)


def _square(first: Ema, second: Ema, a: float, b: float) -> Float[Tensor, ""]:
    """R + g Q, estimated from one step; mean over experts, in squares of an even load."""
    num_experts = first.mean.shape[-1]
    apart = (num_experts * (first.mean - second.mean)).square().mean(dim=-1)
    return apart * ((2 - a) * (2 - b) * (a + b - a * b) / (2 * (a - b) ** 2))
