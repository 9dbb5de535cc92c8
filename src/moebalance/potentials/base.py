"""The interface of every potential, and its rescaling to one slope at the uniform load."""
# ruff: noqa: D102 - `Potential` documents the methods; `UnitSlope`'s docstring gives its formulas.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


class Potential(ABC):
    """A strictly convex, symmetric, differentiable function φ of a load; hyper-parameters only.

    Loads m and prices q are float tensors with the expert axis last and any leading axes, and keep
    their dtype. Loads are not negative and need not sum to one. Constructors raise ValueError
    where φ would not be strictly convex.
    """

    @abstractmethod
    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        """φ(m) of loads (..., E), differentiable by autograd."""

    @abstractmethod
    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """∇φ(m), the prices (..., E) of loads (..., E); finite for every load, also at 0."""

    @abstractmethod
    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        """φ*(q) of prices (..., E); +∞ outside the domain that each class states."""

    @abstractmethod
    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        """∇φ*(q), the loads (..., E) whose prices are q (..., E): the inverse of `grad`.

        No meaning outside the interior of the conjugate's domain: nan, infinite or negative there.
        """

    @abstractmethod
    def slope(self, num_experts: int) -> float:
        """How fast the price rises with the load at 1/E, along directions that keep the sum.

        The one eigenvalue of ∇²φ at the uniform load on sum-zero directions, by symmetry.
        """

    def unit_slope(self) -> UnitSlope:
        """This potential divided by its slope at the uniform load, whatever E its input has.

        At one strength potentials push with very different force, because their slopes differ by
        factors of E; rescaled, they push alike near balance and differ in shape alone.

        >>> from moebalance.potentials import NegativeEntropy
        >>> NegativeEntropy().unit_slope()
        UnitSlope(potential=NegativeEntropy())
        """
        return UnitSlope(self)


@dataclass(frozen=True)
class UnitSlope(Potential):
    """φ/c, with c the slope of φ at the uniform load: its own slope there is 1 for every E.

    Price ∇φ(m)/c, conjugate φ*(c q)/c, inverse ∇φ*(c q); the domain is that of φ* divided by c.
    Methods raise ValueError where c underflows or overflows.

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

    def _scale(self, x: Tensor) -> float:
        c = self.potential.slope(x.shape[-1])
        limits = (
            f"slope {c} at {x.shape[-1]} experts cannot be rescaled to 1; use milder parameters."
        )
        require(0 < c < math.inf, self.potential, limits)
        return c


def require(possible: bool, given: Potential, text: str) -> None:
    """Raise ValueError, naming the potential given and what to do, unless it is possible."""
    if not possible:
        raise ValueError(f"{given}: {text}")
