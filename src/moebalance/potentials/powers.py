"""Powers of the loads: the price is a power too, 0 for an empty expert."""
# ruff: noqa: D102 - `Potential` documents the methods; each class's docstring gives its formulas.

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from moebalance.potentials.base import require
from moebalance.potentials.composed import Potential


@dataclass(frozen=True)
class Euclidean(Potential):
    """φ = ½ Σ m_e², price m_e: the potential behind the Switch loss. Its own conjugate.

    >>> import torch
    >>> Euclidean().grad(torch.tensor([0.25, 0.75]))
    tensor([0.2500, 0.7500])
    """

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return 0.5 * m.square().sum(-1)

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return m.clone()

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return self.value(q)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self.grad(q)

    def slope(self, num_experts: int) -> float:
        return 1.0


@dataclass(frozen=True)
class LpNorm(Potential):
    """φ = (1/p) Σ |m_e|^p, price sgn(m_e) |m_e|^(p−1), for p > 1; p = 2 is `Euclidean`.

    The conjugate is the same with p' in place of p, 1/p + 1/p' = 1: finite everywhere.

    Raises:
        ValueError: p is not a finite number above 1.

    >>> import torch
    >>> LpNorm(3.0).grad(torch.tensor([0.5, 0.5]))
    tensor([0.2500, 0.2500])
    """

    p: float = 3.0

    def __post_init__(self) -> None:
        require(1 < self.p < math.inf, self, "p must be a finite number above 1; 3.0 is usual.")

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return m.abs().pow(self.p).sum(-1) / self.p

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return m.sign() * m.abs().pow(self.p - 1)

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        dual = self.p / (self.p - 1)
        return q.abs().pow(dual).sum(-1) / dual

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return q.sign() * q.abs().pow(1 / (self.p - 1))

    def slope(self, num_experts: int) -> float:
        return float((self.p - 1) * num_experts ** (2 - self.p))
