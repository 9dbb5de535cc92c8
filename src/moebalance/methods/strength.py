"""One unit of strength for every method that charges a potential's gradient.

Near the uniform load a price ∇φ(m) rises with slope c(E): E for negative entropy, 1 for Euclidean,
2/E for l_3. At one α, potentials and numbers of experts so differ by factors of E. The Switch loss
charges the load itself, slope 1. In its unit

    α = strength / c(E),

so that equal strengths push alike near the uniform load, for any method, potential and E: 0.01
means what a Switch coefficient of 0.01 means. `unit="paper"` takes the strength as α itself.
"""

import math
from typing import Literal, Protocol, runtime_checkable

import torch

from moebalance.methods.base import check_positive
from moebalance.potentials import Potential

Unit = Literal["switch", "paper"]

_MOST = 1e9  # what a strength may be multiplied by: prices of a collapsed load still fit float32


@runtime_checkable
class Potent(Protocol):
    """A method that charges α ∇φ."""

    @property
    def potential(self) -> Potential:
        """φ."""

    @property
    def strength(self) -> float:
        """The strength, at least 0."""

    @property
    def unit(self) -> Unit:
        """The unit of the strength."""


def check_strength(method: Potent) -> None:
    """Check potential, strength and unit of a method.

    Raises:
        TypeError: `potential` is not a `Potential`.
        ValueError: a negative strength, or no such unit.
    """
    check_positive("strength", method.strength)
    if method.unit not in ("switch", "paper"):
        raise ValueError(f"unit={method.unit!r}: must be 'switch' or 'paper'.")
    if not isinstance(method.potential, Potential):
        raise TypeError(
            f"potential={method.potential!r}: must be a Potential, for example NegativeEntropy()."
        )


def alpha(method: Potent, num_experts: int) -> float:
    """α of a method for E experts.

    Raises:
        ValueError: the potential has no single slope, or one out of range, and the unit needs one.

    >>> from moebalance.methods import PhiBalancing
    >>> alpha(PhiBalancing(strength=0.01), 32), alpha(PhiBalancing(strength=0.01, unit="paper"), 32)
    (0.0003125, 0.01)
    """
    if method.unit == "paper":
        return method.strength
    try:
        slope = method.potential.slope(num_experts)
    except ValueError as error:
        raise ValueError(f"{error} Give unit='paper', and the strength as α.") from error
    if 1 / _MOST < slope < math.inf:
        return method.strength / slope
    if slope == 0 and not _pushes(method.potential, num_experts):  # such as one of a single group
        return 0.0
    raise ValueError(
        f"{method.potential!r} has slope {slope:.3g} at {num_experts} experts: divided by it, "
        "strengths are out of range. Use milder parameters, or give unit='paper' and the strength "
        "as α."
    )


def _pushes(potential: Potential, num_experts: int) -> bool:
    """Whether experts of a collapsed load have different prices."""
    load = torch.zeros(num_experts, dtype=torch.float64, device="cpu")
    load[0] = 1
    price = potential.grad(load)
    return bool(price.max() > price.min())
