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
"""
# ruff: noqa: D102 - `Potential` documents the methods; each class's docstring gives its formulas.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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

        >>> NegativeEntropy().unit_slope()
        UnitSlope(potential=NegativeEntropy())
        """
        return UnitSlope(self)


@dataclass(frozen=True)
class UnitSlope(Potential):
    """φ/c, with c the slope of φ at the uniform load: its own slope there is 1 for every E.

    Price ∇φ(m)/c, conjugate φ*(c q)/c, inverse ∇φ*(c q); the domain is that of φ* divided by c.
    Methods raise ValueError where c underflows or overflows.

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
        _require(0 < c < math.inf, self.potential, limits)
        return c


@dataclass(frozen=True)
class Euclidean(Potential):
    """φ = ½ Σ m_e², price m_e: the potential behind the Switch loss. Its own conjugate.

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

    >>> LpNorm(3.0).grad(torch.tensor([0.5, 0.5]))
    tensor([0.2500, 0.2500])
    """

    p: float = 3.0

    def __post_init__(self) -> None:
        _require(1 < self.p < math.inf, self, "p must be a finite number above 1; 3.0 is usual.")

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


@dataclass(frozen=True)
class SoftL1(Potential):
    """φ = Σ (|m_e| − δ log(1 + |m_e|/δ)), price m_e/(|m_e| + δ), half its limit 1 at a load of δ.

    φ* = −δ Σ (|q_e| + log(1 − |q_e|)), finite for |q_e| < 1. Loads are of the order of 1/E: a delta
    far above that is nearly Euclidean, one far below hardly tells loads apart.

    >>> SoftL1(delta=0.5).grad(torch.tensor([0.5, 0.0]))
    tensor([0.5000, 0.0000])
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.delta < math.inf, self, "delta must be a finite number above 0; try 1.0.")

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
class NegativeEntropy(Potential):
    """φ = Σ m_e log m_e, price log m_e + 1: the paper's choice. φ* = Σ exp(q_e − 1), all finite.

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
    """φ = Σ (m_e^a − m_e)/(a − 1), price (a m_e^(a−1) − 1)/(a − 1), for positive a other than 1.

    φ* = Σ b_e^(a/(a−1)), b_e = 1 + (a − 1)(q_e − 1)/a. For a > 1 finite everywhere, and constant in
    q_e below −1/(a − 1), the price of an empty expert; for a < 1 finite for q_e < 1/(1 − a).
    As a → 1 all of it becomes `NegativeEntropy`, without loss of precision.

    >>> Tsallis(alpha=2.0).grad(torch.tensor([0.25, 0.75]))
    tensor([-0.5000,  0.5000])
    """

    alpha: float = 1.1

    def __post_init__(self) -> None:
        positive = 0 < self.alpha < math.inf
        _require(positive, self, "alpha must be a finite number above 0; try 1.1.")
        _require(
            self.alpha != 1, self, "alpha must not be 1; the limit there is NegativeEntropy()."
        )

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        excess = self.alpha - 1
        return (m * torch.expm1(excess * _normal(m).log())).sum(-1) / excess

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        excess = self.alpha - 1
        # Above 1 the price of an empty expert is finite by itself: log 0 = −∞ and expm1 of it −1.
        load = m if excess > 0 else _resolved(m)
        return self.alpha * torch.expm1(excess * load.log()) / excess + 1

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return (self.alpha * self._log_load(q)).exp().sum(-1)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self._log_load(q).exp()

    def slope(self, num_experts: int) -> float:
        return float(self.alpha * num_experts ** (2 - self.alpha))

    def _log_load(self, q: Tensor) -> Tensor:
        # b = 0 closes the domain on both sides of a = 1: there log b/(a − 1) is −∞ or +∞.
        excess = self.alpha - 1
        return torch.log1p((excess * (q - 1) / self.alpha).clamp(min=-1)) / excess


@dataclass(frozen=True)
class Renyi(Potential):
    """φ = log(Σ m_e^a)/(a − 1), price −r m_e^(a−1)/Σ_j m_j^a with r = a/(1 − a), for 0 < a < 1.

    Strictly convex: minus the logarithm of a strictly concave sum. Scaling a load by s divides its
    price by s, so ⟨m, q⟩ = −r always, which fixes the scale of the inverse: with powers
    (−q_e)^(−r), ∇φ* = r/(−q_e) · their shares, φ* = log(their sum) + r log r − r, finite for
    q_e < 0. A load that sums to s, as an average started from zero does, is priced 1/s too high.

    >>> Renyi(alpha=0.5).grad(torch.tensor([0.5, 0.5]))
    tensor([-1., -1.])
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        convex = 0 < self.alpha < 1
        _require(convex, self, "alpha must lie between 0 and 1; try 0.5, or Tsallis above 1.")

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
        # a E from the Hessian's diagonal part; the rest is parallel to the all-ones direction.
        return self.alpha * num_experts

    @property
    def _ratio(self) -> float:
        return self.alpha / (1 - self.alpha)

    def _log_powers(self, q: Tensor) -> Tensor:
        return -self._ratio * (-q).clamp(min=0).log()


@dataclass(frozen=True)
class PseudoHuber(Potential):
    """φ = Σ (√(m_e² + δ²) − δ), price m_e/√(m_e² + δ²): linear up to about δ, then turning to 1.

    φ* = Σ (δ − δ √(1 − q_e²)), finite for |q_e| ≤ 1. Both are written without the cancellation.

    >>> PseudoHuber(delta=0.75).value(torch.tensor([1.0, 0.0]))
    tensor(0.5000)
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.delta < math.inf, self, "delta must be a finite number above 0; try 1.0.")

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
    """φ = Σ log cosh(β m_e)/β, price tanh(β m_e): linear up to about 1/β, then turning to 1.

    φ* = Σ ((1 + q_e) log(1 + q_e) + (1 − q_e) log(1 − q_e))/(2β), finite for |q_e| ≤ 1. From
    β m_e = 10 on (20 in float64) the price rounds to 1 and has no inverse.

    >>> LogCosh(beta=1.0).grad(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7616])
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        _require(0 < self.beta < math.inf, self, "beta must be a finite number above 0; try 1.0.")

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
    """φ = Σ log(1 + exp m_e), price sigmoid(m_e); alone in that an empty expert adds log 2.

    φ* = Σ (q_e log q_e + (1 − q_e) log(1 − q_e)), finite for 0 ≤ q_e ≤ 1.

    >>> Softplus().grad(torch.tensor([0.0, 1.0]))
    tensor([0.5000, 0.7311])
    """

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        # F.softplus turns linear at 20, an error of 2e-9; logsigmoid is exact throughout.
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


def _require(possible: bool, given: Potential, text: str) -> None:
    if not possible:
        raise ValueError(f"{given}: {text}")


def _normal(m: Tensor) -> Tensor:
    """m raised to the smallest normal number, so that no logarithm is −∞ and no power overflows."""
    return m.clamp(min=torch.finfo(m.dtype).tiny)


def _resolved(m: Tensor) -> Tensor:
    """m raised to machine epsilon, so that a price with a power pole stays usable in a gradient."""
    return m.clamp(min=torch.finfo(m.dtype).eps)
