"""Negative entropies: an empty expert is a pole of the price, except for Tsallis above 1."""
# ruff: noqa: D102 - `Potential` documents the methods; each class's docstring gives its formulas.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.potentials.base import require
from moebalance.potentials.composed import Potential


@dataclass(frozen=True)
class NegativeEntropy(Potential):
    """φ = Σ m_e log m_e, price log m_e + 1: the paper's choice. φ* = Σ exp(q_e − 1), finite.

    >>> NegativeEntropy().grad(torch.tensor([1.0, 0.0]))
    tensor([  1.0000, -86.3365])
    """

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return torch.xlogy(m, _normal(m)).sum(-1)

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return _normal(m).log() + 1

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return (q - 1).exp().sum(-1)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return (q - 1).exp()

    def slope(self, num_experts: int) -> float:
        return float(num_experts)


@dataclass(frozen=True)
class Tsallis(Potential):
    """φ = Σ (m_e^a − m_e)/(a − 1), price (a m_e^(a−1) − 1)/(a − 1), for a > 0 except 1.

    φ* = Σ b_e^(a/(a−1)), b_e = 1 + (a − 1)(q_e − 1)/a. For a > 1 it is finite everywhere, and
    constant in q_e below −1/(a − 1), the price of an empty expert. For a < 1 it is finite for
    q_e < 1/(1 − a).
    As a → 1 everything becomes `NegativeEntropy`, without loss of precision.

    Args:
        alpha: a.

    Raises:
        ValueError: a is not a finite number above 0, or is 1.

    >>> Tsallis(alpha=2.0).grad(torch.tensor([0.25, 0.75]))
    tensor([-0.5000,  0.5000])
    """

    alpha: float = 1.1

    def __post_init__(self) -> None:
        positive = 0 < self.alpha < math.inf
        require(positive, self, "alpha must be a finite number above 0; try 1.1.")
        require(self.alpha != 1, self, "alpha must not be 1; the limit there is NegativeEntropy().")

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        excess = self.alpha - 1
        return (m * torch.expm1(excess * _normal(m).log())).sum(-1) / excess

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        excess = self.alpha - 1
        # Above 1 the price of an empty expert is finite: log 0 = −∞, and expm1 of it is −1.
        load = m if excess > 0 else _resolved(m)
        return self.alpha * torch.expm1(excess * load.log()) / excess + 1

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return (self.alpha * self._log_load(q)).exp().sum(-1)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self._log_load(q).exp()

    def slope(self, num_experts: int) -> float:
        return float(self.alpha * num_experts ** (2 - self.alpha))

    def _log_load(self, q: Tensor) -> Tensor:
        # b = 0 is the end of the domain, for a > 1 and a < 1: there log b/(a − 1) is −∞ or +∞.
        excess = self.alpha - 1
        return torch.log1p((excess * (q - 1) / self.alpha).clamp(min=-1)) / excess


@dataclass(frozen=True)
class Renyi(Potential):
    """φ = log(Σ m_e^a)/(a − 1), price −r m_e^(a−1)/Σ_j m_j^a, r = a/(1 − a), for 0 < a < 1.

    Strictly convex: minus the logarithm of a strictly concave sum. If you multiply a load by s, its
    price is divided by s. So ⟨m, q⟩ = −r always, which fixes the scale of the inverse: with the
    powers w_e = (−q_e)^(−r), ∇φ*_e = r/(−q_e) · w_e / Σ_j w_j and φ* = log Σ_j w_j + r log r − r,
    finite for q_e < 0. An average that started from zero sums to s < 1, so its price is 1/s times
    as high.

    Args:
        alpha: a.

    Raises:
        ValueError: a is not between 0 and 1.

    >>> Renyi(alpha=0.5).grad(torch.tensor([0.5, 0.5]))
    tensor([-1., -1.])
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        convex = 0 < self.alpha < 1
        require(convex, self, "alpha must lie between 0 and 1; try 0.5, or Tsallis above 1.")

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        excess = self.alpha - 1
        return (m * (excess * _normal(m).log()).exp()).sum(-1).log() / excess

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        load = _resolved(m)
        return -self._ratio * (self.alpha * load.log()).softmax(-1) / load

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        r = self._ratio
        return torch.logsumexp(self._log_powers(q), -1) + r * math.log(r) - r

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return -self._ratio * self._log_powers(q).softmax(-1) / q

    def slope(self, num_experts: int) -> float:
        # The Hessian's diagonal part gives a E; the rest acts on the all-ones direction only.
        return self.alpha * num_experts

    @property
    def _ratio(self) -> float:
        return self.alpha / (1 - self.alpha)

    def _log_powers(self, q: Tensor) -> Tensor:
        return -self._ratio * (-q).clamp(min=0).log()


def _normal(m: Tensor) -> Tensor:
    """m raised to the smallest normal number: then no logarithm is −∞ and no power overflows."""
    return m.clamp(min=torch.finfo(m.dtype).tiny)


def _resolved(m: Tensor) -> Tensor:
    """m raised to machine epsilon: then a price with a power pole stays usable in a gradient."""
    return m.clamp(min=torch.finfo(m.dtype).eps)
