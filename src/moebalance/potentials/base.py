"""The mathematics that every potential offers: value, price, conjugate and slope."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from moebalance.proportions import Proportions


class ConvexFunction(ABC):
    """A convex, differentiable function φ of a load; hyper-parameters only.

    Loads m and prices q are float tensors with the expert axis last and any leading axes, and keep
    their dtype. Loads are not negative and need not sum to one. Constructors raise ValueError if φ
    would not be convex.
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

        The eigenvalue of ∇²φ at the uniform load on sum-zero directions: by symmetry the only one
        of the paper's potentials, the largest of composed ones.
        """

    def check(self, num_experts: int) -> None:
        """Say whether loads of so many experts fit.

        Raises:
            ValueError: they do not; says why.
        """
        return

    @property
    def aim(self) -> Proportions | None:
        """The shares of the load at which φ is least; None where they are equal."""
        return None


def require(possible: bool, given: ConvexFunction, text: str) -> None:
    """Raise ValueError, naming the potential given and what to do, unless it is possible."""
    if not possible:
        raise ValueError(f"{given}: {text}")
