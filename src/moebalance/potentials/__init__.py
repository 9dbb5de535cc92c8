"""Potentials: strictly convex, symmetric functions of an expert load, least at the uniform load.

Source: φ-Balancing for Mixture-of-Experts Training, arXiv 2605.15403, Table 1.

A potential φ measures how unbalanced a load m (E,) is. Its gradient q = ∇φ(m) is the price of each
expert, high where the load is high. Its conjugate φ*(q) = sup_m ⟨m, q⟩ − φ(m) inverts the price,
∇φ*(∇φ(m)) = m, and Fenchel–Young holds: φ(m) + φ*(q) ≥ ⟨m, q⟩, equal where q = ∇φ(m). Mirror
ascent on the price, q⁺ = ∇φ(∇φ*(q) + η (p − ∇φ*(q))), is therefore a moving average of the load,
m⁺ = (1 − η) m + η p: this is why φ-balancing needs no state but m.

An expert at exactly 0. Values are exact there (0·log 0 = 0). The prices of the entropies have a
pole at 0, and an infinite price turns the router's gradient into NaN; `grad` therefore reads such a
load as the smallest one it prices: the dtype's smallest normal number under the logarithm of
`NegativeEntropy` (price −86 in float32), the dtype's machine epsilon under the powers of `Renyi`
and of `Tsallis` below 1, where the smallest normal number would cost −10¹⁹ and overflow the
gradient's norm. Above that load every price is the formula's own.

Where loads shall not be equal, or not of experts, potentials compose (`composed.py`):
`potential.relative_to(shares)`, `potential.grouped(groups)`, and sums with weights.
"""

from moebalance.potentials.composed import Combined, Grouped, Potential, Relative, UnitSlope
from moebalance.potentials.entropies import NegativeEntropy, Renyi, Tsallis
from moebalance.potentials.powers import Euclidean, LpNorm
from moebalance.potentials.saturating import LogCosh, PseudoHuber, SoftL1, Softplus

__all__ = [
    "POTENTIALS",
    "Combined",
    "Euclidean",
    "Grouped",
    "LogCosh",
    "LpNorm",
    "NegativeEntropy",
    "Potential",
    "PseudoHuber",
    "Relative",
    "Renyi",
    "SoftL1",
    "Softplus",
    "Tsallis",
    "UnitSlope",
]

POTENTIALS: tuple[type[Potential], ...] = (
    Euclidean,
    LpNorm,
    SoftL1,
    NegativeEntropy,
    Tsallis,
    Renyi,
    PseudoHuber,
    LogCosh,
    Softplus,
)
"""The potentials of the paper's Table 1, in its order."""
