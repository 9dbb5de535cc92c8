"""The mathematics that every potential offers: value, price, conjugate and slope."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from moebalance.proportions import Proportions


class ConvexFunction(ABC):
    """A convex, differentiable function φ of a load; it holds hyper-parameters only.

    Loads m and prices q are float tensors (..., E) and keep their dtype. Loads are not negative and
    need not sum to one.

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


def require(possible: bool, given: ConvexFunction, text: str) -> None:
    """Raise ValueError unless `possible`; the message names the potential and the remedy."""
    if not possible:
        raise ValueError(f"{given}: {text}")
