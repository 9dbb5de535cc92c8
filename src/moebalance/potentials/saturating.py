"""Potentials whose price saturates: it never exceeds 1, however high the load."""
# ruff: noqa: D102 - `Potential` documents the methods; each class's docstring gives its formulas.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moebalance.potentials.base import require
from moebalance.potentials.composed import Potential


@dataclass(frozen=True)
class SoftL1(Potential):
    """φ = Σ (|m_e| − δ log(1 + |m_e|/δ)), price m_e/(|m_e| + δ), half its limit 1 at a load of δ.

    φ* = −δ Σ (|q_e| + log(1 − |q_e|)), finite for |q_e| < 1. Loads are about 1/E. With a much
    larger δ this is nearly Euclidean; with a much smaller δ the price hardly depends on the load.

    Args:
        delta: δ.

    Raises:
        ValueError: δ is not a finite number above 0.

    >>> SoftL1(delta=0.5).grad(torch.tensor([0.5, 0.0]))
    tensor([0.5000, 0.0000])
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.delta < math.inf, self, "delta must be a finite number above 0; try 1.0.")

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return (m.abs() - self.delta * torch.log1p(m.abs() / self.delta)).sum(-1)

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return m / (m.abs() + self.delta)

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        size = q.abs().clamp(max=1)
        return -self.delta * (size + torch.log1p(-size)).sum(-1)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self.delta * q / (1 - q.abs())

    def slope(self, num_experts: int) -> float:
        return self.delta / (1 / num_experts + self.delta) ** 2


@dataclass(frozen=True)
class PseudoHuber(Potential):
    """φ = Σ (√(m_e² + δ²) − δ), price m_e/√(m_e² + δ²): linear up to about δ, then close to 1.

    φ* = Σ (δ − δ √(1 − q_e²)), finite for |q_e| ≤ 1. The code writes both without cancellation.

    Args:
        delta: δ.

    Raises:
        ValueError: δ is not a finite number above 0.

    >>> PseudoHuber(delta=0.75).value(torch.tensor([1.0, 0.0]))
    tensor(0.5000)
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.delta < math.inf, self, "delta must be a finite number above 0; try 1.0.")

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return (m.square() / ((m.square() + self.delta**2).sqrt() + self.delta)).sum(-1)

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return m / (m.square() + self.delta**2).sqrt()

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        terms = self.delta * q.square() / (1 + ((1 - q) * (1 + q)).sqrt())
        return torch.where(q.abs() <= 1, terms, math.inf).sum(-1)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self.delta * q / ((1 - q) * (1 + q)).sqrt()

    def slope(self, num_experts: int) -> float:
        return self.delta**2 / math.hypot(1 / num_experts, self.delta) ** 3


@dataclass(frozen=True)
class LogCosh(Potential):
    """φ = Σ log cosh(β m_e)/β, price tanh(β m_e): linear up to about 1/β, then close to 1.

    φ* = Σ ((1 + q_e) log(1 + q_e) + (1 − q_e) log(1 − q_e))/(2β), finite for |q_e| ≤ 1. From
    β m_e = 10 on (20 in float64) the price rounds to 1 and has no inverse.

    Args:
        beta: β.

    Raises:
        ValueError: β is not a finite number above 0.

    >>> LogCosh(beta=1.0).grad(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7616])
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.beta < math.inf, self, "beta must be a finite number above 0; try 1.0.")

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        x = self.beta * m.abs()
        return (x + torch.log1p(torch.expm1(-2 * x) / 2)).sum(-1) / self.beta

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return torch.tanh(self.beta * m)

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        terms = torch.special.xlog1py(1 + q, q) + torch.special.xlog1py(1 - q, -q)
        return torch.where(q.abs() <= 1, terms, math.inf).sum(-1) / (2 * self.beta)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return torch.atanh(q) / self.beta

    def slope(self, num_experts: int) -> float:
        decay = math.exp(-2 * self.beta / num_experts)
        return 4 * self.beta * decay / (1 + decay) ** 2


@dataclass(frozen=True)
class Softplus(Potential):
    """φ = Σ log(1 + exp m_e), price sigmoid(m_e). Only here does an empty expert add log 2.

    φ* = Σ (q_e log q_e + (1 − q_e) log(1 − q_e)), finite for 0 ≤ q_e ≤ 1.

    >>> Softplus().grad(torch.tensor([0.0, 1.0]))
    tensor([0.5000, 0.7311])
    """

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        # F.softplus is linear above 20, an error of 2e-9; logsigmoid is exact everywhere.
        return -F.logsigmoid(-m).sum(-1)

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return torch.sigmoid(m)

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        terms = torch.xlogy(q, q) + torch.special.xlog1py(1 - q, -q)
        return torch.where((q >= 0) & (q <= 1), terms, math.inf).sum(-1)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return torch.logit(q)

    def slope(self, num_experts: int) -> float:
        sigmoid = 1 / (1 + math.exp(-1 / num_experts))
        return sigmoid * (1 - sigmoid)
