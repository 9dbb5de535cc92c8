"""The interface of every potential, how they compose, and the rescaling to one slope at 1/E."""
# ruff: noqa: D102 - `Potential` documents the methods; `UnitSlope`'s docstring gives its formulas.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from moebalance.proportions import Proportions

if TYPE_CHECKING:
    from moebalance.potentials.composed import Combined, Grouped, Relative


class Potential(ABC):
    """A convex, differentiable function φ of a load; it holds hyper-parameters only.

    The paper's potentials are strictly convex and symmetric. Composed ones (`composed.py`) may be
    least elsewhere than at the uniform load, or at more than one load. Loads m and prices q are
    float tensors (..., E) and keep their dtype. Loads are not negative and need not sum to one.

    Raises:
        ValueError: from constructors, if φ would not be convex.
    """

    @abstractmethod
    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        """φ(m) of loads (..., E), differentiable by autograd."""

    @abstractmethod
    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """∇φ(m), the prices (..., E) of loads (..., E); finite for every load, 0 included."""

    @abstractmethod
    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        """φ*(q) (...) of prices (..., E); +∞ outside the domain that each class gives."""

    @abstractmethod
    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """∇φ*(q), the loads (..., E) whose prices are q (..., E): the inverse of `grad`.

        Outside the interior of the conjugate's domain the result is meaningless: nan, infinite or
        negative.
        """

    @abstractmethod
    def slope(self, num_experts: int) -> float:
        """How fast the price rises with the load at 1/E, if the sum of the loads stays.

        This is the eigenvalue of ∇²φ at the uniform load on sum-zero directions. The paper's
        potentials have one, by symmetry; for composed potentials it is the largest.
        """

    def check(self, num_experts: int) -> None:
        """Check that loads of this many experts fit.

        Raises:
            ValueError: they do not fit; the message says why.
        """
        return

    @property
    def aim(self) -> Proportions | None:
        """The proportions at which φ is least; None for equal ones."""
        return None

    def relative_to(self, proportions: Iterable[float]) -> Relative:
        """The divergence from given proportions: least there, not at the uniform load.

        >>> from moebalance.potentials import Euclidean
        >>> Euclidean().relative_to((3, 1))
        Relative(potential=Euclidean(), proportions=(3, 1))
        """
        from moebalance.potentials.composed import Relative

        return Relative(self, tuple(proportions))

    def grouped(self, groups: int | Iterable[int]) -> Grouped:
        """This potential of the loads of groups of experts; see `Grouped`."""
        from moebalance.potentials.composed import Grouped

        return Grouped(self, groups if isinstance(groups, int) else tuple(groups))

    def __add__(self, other: Potential) -> Combined:
        """The sum of both: prices add."""
        from moebalance.potentials.composed import Combined

        if not isinstance(other, Potential):
            return NotImplemented
        sides = [
            (side.parts, side.weights) if isinstance(side, Combined) else ((side,), (1.0,))
            for side in (self, other)
        ]
        return Combined(*(a + b for a, b in zip(*sides, strict=True)))

    def __mul__(self, weight: float) -> Combined:
        """`weight` times this potential, and its price."""
        from moebalance.potentials.composed import Combined

        if isinstance(weight, bool) or not isinstance(weight, int | float):
            return NotImplemented
        if isinstance(self, Combined):
            return Combined(self.parts, tuple(weight * w for w in self.weights))
        return Combined((self,), (float(weight),))

    __rmul__ = __mul__

    def unit_slope(self) -> UnitSlope:
        """This potential divided by its slope at the uniform load, for any E.

        At equal strength, potentials push with very different force, because their slopes differ by
        factors of E. Rescaled, they push alike near balance, and differ only in shape.

        >>> from moebalance.potentials import NegativeEntropy
        >>> NegativeEntropy().unit_slope()
        UnitSlope(potential=NegativeEntropy())
        """
        return UnitSlope(self)


@dataclass(frozen=True)
class UnitSlope(Potential):
    """φ/c, where c is the slope of φ at the uniform load: its own slope there is 1 for every E.

    Price ∇φ(m)/c, conjugate φ*(c q)/c, inverse ∇φ*(c q); its domain is the domain of φ* divided by
    c. Methods raise ValueError if c underflows or overflows.

    >>> import torch
    >>> from moebalance.potentials import NegativeEntropy
    >>> UnitSlope(NegativeEntropy()).grad(torch.tensor([0.5, 0.5]))
    tensor([0.1534, 0.1534])
    """

    potential: Potential

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return self.potential.value(m) / self._scale(m)

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self.potential.grad(m) / self._scale(m)

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        c = self._scale(q)
        return self.potential.conjugate(c * q) / c

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self.potential.conjugate_grad(self._scale(q) * q)

    def slope(self, num_experts: int) -> float:
        return 1.0

    def check(self, num_experts: int) -> None:
        self.potential.check(num_experts)

    @property
    def aim(self) -> Proportions | None:
        return self.potential.aim

    def _scale(self, x: Tensor) -> float:
        c = self.potential.slope(x.shape[-1])
        limits = (
            f"slope {c} at {x.shape[-1]} experts cannot be rescaled to 1; use milder parameters."
        )
        require(0 < c < math.inf, self.potential, limits)
        return c


def require(possible: bool, given: Potential, text: str) -> None:
    """Raise ValueError unless `possible`; the message names the potential and the remedy."""
    if not possible:
        raise ValueError(f"{given}: {text}")
