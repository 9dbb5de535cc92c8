"""Potentials: strictly convex, symmetric functions of a load, least at the uniform load.

Source: φ-Balancing for Mixture-of-Experts Training, arXiv 2605.15403, Table 1.

A potential φ measures how unbalanced a load m (E,) is.

- Its gradient q = ∇φ(m) (E,) is the price of each expert, high where the load is high.
- Its conjugate φ*(q) = sup_m ⟨m, q⟩ − φ(m) inverts the price: ∇φ*(∇φ(m)) = m.
- Fenchel–Young holds: φ(m) + φ*(q) ≥ ⟨m, q⟩, equal at q = ∇φ(m).
- Mirror ascent on the price, q⁺ = ∇φ(∇φ*(q) + η (p − ∇φ*(q))), is a moving average of the load,
  m⁺ = (1 − η) m + η p. So φ-balancing needs no state except m.

An expert at exactly 0. Values are exact there (0·log 0 = 0), but the prices of the entropies have a
pole, and an infinite price would turn the router's gradient into NaN. So `grad` raises such a load
to the smallest one that it prices:

- `NegativeEntropy` (logarithm): the dtype's smallest normal number, price −86 in float32.
- `Renyi`, and `Tsallis` below 1 (powers): the dtype's machine epsilon. The smallest normal number
  would cost −10¹⁹ and overflow the gradient's norm.

Above that load every price is exactly the formula's.

For unequal loads, or loads of groups, potentials compose (`composed.py`):
`potential.relative_to(proportions)`, `potential.grouped(groups)`, and sums with weights.
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
"""The nine potentials of the paper's Table 1, in its order."""
