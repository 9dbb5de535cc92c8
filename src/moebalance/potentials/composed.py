"""Potentials made of potentials: for given proportions, groups of experts, several levels.

All are convex with price ∇φ, so φ-balancing, the plug-in loss and goals take them unchanged:

    Relative    D_φ(m ‖ ρ) = φ(m) − φ(ρ) − ⟨∇φ(ρ), m − ρ⟩      price ∇φ(m) − ∇φ(ρ)
    Grouped     φ(A m), A (G, E) sums the experts of a group     price Aᵀ ∇φ(A m)
    Combined    Σ_i w_i φ_i(m)                                   price Σ_i w_i ∇φ_i(m)

D_φ is the Bregman divergence of φ, least only at m = ρ. For example, it is the Kullback–Leibler
divergence for negative entropy, and half the squared distance for Euclidean. With equal
proportions ∇φ(ρ) is constant, which no centred price shows; with one group for each expert A is the
identity. Both are then the potential itself. Groups and moving averages commute: A·m is the average
of the groups' own loads. One group of all experts has a constant price, so no gradient.
"""
# ruff: noqa: D102 - `Potential` documents the methods; each class's docstring gives its formulas.

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moebalance.potentials.base import ConvexFunction, require
from moebalance.proportions import (
    Proportions,
    check_proportions,
    constant,
    fractions,
    settle_proportions,
)


class Potential(ConvexFunction):
    """A convex φ that composes with others: `relative_to`, `grouped`, `+`, `*`, `unit_slope`.

    The paper's potentials are strictly convex and symmetric. Composed ones may be least elsewhere
    than at the uniform load, or at more than one load.
    """

    def relative_to(self, proportions: Iterable[float]) -> Relative:
        """The divergence from given proportions: least there, not at the uniform load.

        >>> from moebalance.potentials import Euclidean
        >>> Euclidean().relative_to((3, 1))
        Relative(potential=Euclidean(), proportions=(3, 1))
        """
        return Relative(self, tuple(proportions))

    def grouped(self, groups: int | Iterable[int]) -> Grouped:
        """This potential of the loads of groups of experts; see `Grouped`."""
        return Grouped(self, groups if isinstance(groups, int) else tuple(groups))

    def __add__(self, other: Potential) -> Combined:
        """The sum of both: prices add."""
        if not isinstance(other, Potential):
            return NotImplemented
        sides = [
            (side.parts, side.weights) if isinstance(side, Combined) else ((side,), (1.0,))
            for side in (self, other)
        ]
        return Combined(*(a + b for a, b in zip(*sides, strict=True)))

    def __mul__(self, weight: float) -> Combined:
        """`weight` times this potential, and its price."""
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


@dataclass(frozen=True)
class Relative(Potential):
    """D_φ(m ‖ ρ), 0 at the proportions ρ and positive elsewhere.

    Conjugate φ_ρ*(q) = φ*(q + ∇φ(ρ)) − φ*(∇φ(ρ)), with gradient ∇φ*(q + ∇φ(ρ)); its domain is the
    domain of φ*, shifted. The Hessian is φ's, so the slope at the uniform load is too.

    Args:
        potential: φ.
        proportions: ρ (E,), positive; only their ratios matter.

    Raises:
        ValueError: a proportion is not positive.

    >>> from moebalance.potentials import NegativeEntropy
    >>> aimed = NegativeEntropy().relative_to((2, 1, 1))
    >>> aimed.grad(torch.tensor([0.5, 0.25, 0.25]))
    tensor([0., 0., 0.])
    """

    potential: Potential
    proportions: Proportions

    def __post_init__(self) -> None:
        settle_proportions(self)

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        rho = fractions(self.proportions, m)
        tangent = ((m - rho) * self.potential.grad(rho)).sum(-1)
        return self.potential.value(m) - self.potential.value(rho) - tangent

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self.potential.grad(m) - self._origin(m)

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        origin = self._origin(q)
        return self.potential.conjugate(q + origin) - self.potential.conjugate(origin)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self.potential.conjugate_grad(q + self._origin(q))

    def slope(self, num_experts: int) -> float:
        return self.potential.slope(num_experts)

    def check(self, num_experts: int) -> None:
        check_proportions(self.proportions, num_experts)
        self.potential.check(num_experts)

    @property
    def aim(self) -> Proportions | None:
        return self.proportions

    def _origin(self, like: Tensor) -> Tensor:
        return self.potential.grad(fractions(self.proportions, like))


@dataclass(frozen=True)
class Grouped(Potential):
    """φ(A m): balance between groups of experts (devices, nodes), with freedom inside each.

    It is convex, not strictly: it does not see how the load of a group is divided inside it.
    φ_G*(Aᵀ λ) = φ*(λ), and +∞ for prices that differ inside a group. Many loads have the prices
    Aᵀ λ; `conjugate_grad` gives the one that is even inside the groups, which is the smallest. So
    grad ∘ conjugate_grad is the identity; conjugate_grad ∘ grad makes a load even inside groups.

    Args:
        potential: φ, of the groups' loads (G,).
        groups: G, for G blocks of E / G neighbours, as frameworks place experts on ranks; or the
            group number, 0 … G − 1, of each expert.

    Raises:
        ValueError: no group, or group numbers that skip one.

    >>> from moebalance.potentials import Euclidean
    >>> Euclidean().grouped(2).grad(torch.tensor([0.5, 0.25, 0.25, 0.0]))
    tensor([0.7500, 0.7500, 0.2500, 0.2500])
    """

    potential: Potential
    groups: int | tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.groups, int):
            require(self.groups >= 1, self, "give 1 group or more.")
            return
        object.__setattr__(self, "groups", tuple(self.groups))
        numbers = set(range(len(set(self.groups))))
        named = "number the groups from 0 on, without gaps, one number for each expert."
        require(set(self.groups) == numbers != set(), self, named)

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        return self.potential.value(self.loads(m))

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        return self._spread(self.potential.grad(self.loads(m)), m.shape[-1])

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        inside = self._membership(q)
        rows = q.unsqueeze(-2)
        high = torch.where(inside, rows, -torch.inf).amax(-1)
        low = torch.where(inside, rows, torch.inf).amin(-1)
        return torch.where((high == low).all(-1), self.potential.conjugate(high), torch.inf)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        sizes = self._membership(q).sum(-1)
        of_group = self.potential.conjugate_grad(self.loads(q) / sizes)
        return self._spread(of_group / sizes, q.shape[-1])

    def slope(self, num_experts: int) -> float:
        """The slope between groups of one size; inside groups it is 0."""
        self.check(num_experts)
        count = self._count
        sizes = {num_experts // count}
        if not isinstance(self.groups, int):
            sizes = set(Counter(self.groups).values())
        require(
            len(sizes) == 1,
            self,
            "groups of unequal size have no single slope at the uniform load.",
        )
        return sizes.pop() * self.potential.slope(count) if count > 1 else 0.0

    def check(self, num_experts: int) -> None:
        if isinstance(self.groups, int):
            even = num_experts % self.groups == 0
            require(even, self, f"{num_experts} experts do not make {self.groups} equal groups.")
        else:
            named = len(self.groups)
            wrong = f"it names groups of {named} experts, not {num_experts}."
            require(named == num_experts, self, wrong)
        self.potential.check(self._count)

    def loads(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch G"]:
        """A m, the load of each group (..., G)."""
        self.check(m.shape[-1])
        if isinstance(self.groups, int):
            return m.reshape(*m.shape[:-1], self.groups, -1).sum(-1)
        # A product and a sum, because a matrix product may be taken in lower precision.
        return (self._membership(m) * m.unsqueeze(-2)).sum(-1)

    @property
    def _count(self) -> int:
        return self.groups if isinstance(self.groups, int) else max(self.groups) + 1

    def _spread(self, of_group: Tensor, num_experts: int) -> Tensor:
        """Aᵀ u: each expert gets the value of its group."""
        if isinstance(self.groups, int):
            size = num_experts // self.groups
            return of_group.unsqueeze(-1).expand(*of_group.shape, size).flatten(-2)
        return of_group.index_select(-1, self._index(of_group))

    def _membership(self, like: Tensor) -> Tensor:
        """A (G, E), as bool."""
        groups = torch.arange(self._count, device=like.device).unsqueeze(-1)
        return groups == self._index(like)

    def _index(self, like: Tensor) -> Int[Tensor, " E"]:
        if isinstance(self.groups, int):
            experts = torch.arange(like.shape[-1], device=like.device)
            return experts // (like.shape[-1] // self.groups)
        return constant(self.groups, dtype=torch.long, device=like.device)


@dataclass(frozen=True)
class Combined(Potential):
    """Σ_i w_i φ_i: several levels at once, for example strong between nodes and weak inside.

    `+` and `*` of potentials make it. One weighted potential has the conjugate w φ*(q / w); a sum
    has none in closed form.

    Args:
        parts: the potentials.
        weights: w_i > 0, one for each part.

    Raises:
        ValueError: no part, another number of weights, or a weight that is not positive.
        NotImplementedError: from the conjugates of a sum.

    >>> from moebalance.potentials import Euclidean, NegativeEntropy
    >>> levels = NegativeEntropy().grouped(4) + 0.1 * Euclidean()
    >>> levels.parts
    (Grouped(potential=NegativeEntropy(), groups=4), Euclidean())
    >>> levels.weights
    (1.0, 0.1)
    """

    parts: tuple[Potential, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("parts", "weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        pairs = len(self.parts) == len(self.weights) > 0
        require(pairs, self, "give as many weights as potentials, one or more.")
        positive = all(0 < w < math.inf for w in self.weights)
        require(positive, self, "weights must be finite numbers above 0.")

    def value(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        terms = [w * part.value(m) for w, part in zip(self.weights, self.parts, strict=True)]
        return torch.stack(terms).sum(0)

    def grad(self, m: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        terms = [w * part.grad(m) for w, part in zip(self.weights, self.parts, strict=True)]
        return torch.stack(terms).sum(0)

    def conjugate(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
        part, weight = self._only()
        return weight * part.conjugate(q / weight)

    def conjugate_grad(self, q: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
        part, weight = self._only()
        return part.conjugate_grad(q / weight)

    def slope(self, num_experts: int) -> float:
        """The largest slope: between the coarsest groups, if each level divides the one above."""
        pairs = zip(self.weights, self.parts, strict=True)
        return sum(weight * part.slope(num_experts) for weight, part in pairs)

    def check(self, num_experts: int) -> None:
        for part in self.parts:
            part.check(num_experts)

    @property
    def aim(self) -> Proportions | None:
        """The proportions of the parts that have some, if they agree."""
        found = {part.aim for part in self.parts if part.aim is not None}
        return found.pop() if len(found) == 1 else None

    def _only(self) -> tuple[Potential, float]:
        if len(self.parts) > 1:
            raise NotImplementedError(
                f"{self!r}: the conjugate of a sum has no closed form. Nothing in training needs "
                "it: m is averaged, and its price is `grad`."
            )
        return self.parts[0], self.weights[0]
