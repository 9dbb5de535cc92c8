"""Does a load swing? The autocorrelation of a layer's loads over steps, without sampling noise.

With d_t the deviation of E·f_t from its straight line over t, in units of an even share, and

    c(k) = mean over t and e of d_{t,e} · d_{t+k,e},

c(0) holds the noise of sampling a batch, which is independent from step to step; c(1) does not. So
√c(1) is how far a load swings, and the lag of the first deep negative c(k) is half of a period.
A drift has such a trough too, but does not come back from it: an oscillation has a peak one period
on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Swing(NamedTuple):
    """How one layer's loads move.

    Attributes:
        amplitude: √c(1), root mean square over experts, in units of an even share.
        trough: min_k c(k) / c(1): near −1 for a steady oscillation, near 0 for a drift or noise.
        rebound: the largest c(k) / c(1) at lags beyond the trough.
        period: steps, twice the lag of the trough.
    """

    amplitude: float
    trough: float
    rebound: float
    period: int

    @property
    def oscillates(self) -> bool:
        """A swing of a tenth of a share or more that comes back as its opposite."""
        return self.amplitude > 0.1 and self.trough < -0.4 and self.rebound > 0.3


def swing(loads: Sequence[Sequence[float]]) -> Swing:
    """Measure the swing of loads (T, E) of T consecutive steps, each summing to 1.

    >>> wave = [0.5 + 0.2 * math.sin(2 * math.pi * t / 20) for t in range(200)]
    >>> found = swing([[w, 1 - w] for w in wave])
    >>> round(found.amplitude, 2), found.period, found.oscillates
    (0.28, 20, True)
    """
    share = np.asarray(loads, dtype=float)
    steps, num_experts = share.shape
    time = np.linspace(-1, 1, steps)
    share -= share.mean(axis=0)
    deviation = num_experts * (share - np.outer(time, time @ share) / (time @ time))
    lags = range(1, max(2, 2 * steps // 3))
    found = [float(np.mean(deviation[k:] * deviation[: steps - k])) for k in lags]
    first = found[0]
    if first <= 0:
        return Swing(0.0, 0.0, 0.0, 0)
    # The first of about equally deep troughs: later ones are the same, whole periods on.
    near = next(i for i, c in enumerate(found) if c <= 0.8 * min(found) or c == min(found))
    deepest = min(range(near, min(len(found), 2 * near + 2)), key=found.__getitem__)
    trough, rebound = found[deepest] / first, max(found[deepest:]) / first
    return Swing(math.sqrt(first), min(0.0, trough), rebound, 2 * lags[deepest])
