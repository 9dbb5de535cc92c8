"""Goals for `Targeted`: how even the load should be.

A goal's ratio is 1 when the goal is just met, larger for a load that is less even, and 0 for a
perfectly even load. With proportions ρ, a load is even if f_e / ρ_e is the same for all experts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance import metrics
from moebalance.methods.base import check_positive, described
from moebalance.proportions import Proportions, fractions, settle_proportions
from moebalance.routing import Sums


@dataclass(frozen=True, repr=False)
class Goal(ABC):
    """An upper bound on one measure of unevenness.

    Args:
        at_most: the bound, greater than 0, in the metric's unit.
        load: "hard" for the top-k assignments, "soft" for the mean scores.
        proportions: (E,) positive, target parts of the load; None for equal parts.

    Raises:
        ValueError: the bound is not a positive number, or `load` is neither "hard" nor "soft".
    """

    at_most: float
    load: Literal["hard", "soft"] = "hard"
    proportions: Proportions | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_positive("at_most", self.at_most, zero=False)
        if self.load not in ("hard", "soft"):
            raise ValueError(f"load={self.load!r}: must be 'hard' or 'soft'.")
        settle_proportions(self)

    def __repr__(self) -> str:
        return described(self)

    @abstractmethod
    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """Unevenness () of a load (E,) that sums to 1: 0 if it is even.

        Raises:
            ValueError: the goal does not fit this number of experts.
        """

    def ratio(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """measure / at_most, (): at most 1 if the goal is met."""
        return self.measure(load) / self.at_most

    def of(self, sums: Sums) -> Float[Tensor, "E"]:
        """The load (E,) that the goal is about."""
        return sums.soft_load if self.load == "soft" else sums.hard_load

    def _proportions(self, load: Float[Tensor, "E"]) -> Float[Tensor, "E"] | None:
        return None if self.proportions is None else fractions(self.proportions, load)

    @property
    def reads(self) -> str:
        """Which of the sums that is."""
        return "scores" if self.load == "soft" else "counts"


@dataclass(frozen=True, repr=False)
class MaxVio(Goal):
    """The busiest expert at most this far above its part: max_e f_e / ρ_e − 1, ρ_e = 1/E if even.

    >>> import torch
    >>> MaxVio(0.5).ratio(torch.tensor([0.5, 0.25, 0.25, 0.0])).item()
    2.0
    """

    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """`metrics.max_violation`."""
        return metrics.max_violation(load, self._proportions(load))


@dataclass(frozen=True, repr=False)
class Gini(Goal):
    """The Gini coefficient of the load at most this large.

    >>> import torch
    >>> round(Gini(0.25).ratio(torch.tensor([0.5, 0.5, 0.0, 0.0])).item(), 6)
    2.0
    """

    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """`metrics.gini`."""
        return metrics.gini(load, self._proportions(load))


@dataclass(frozen=True, repr=False)
class EntropyDeficit(Goal):
    """Entropy at most this far below its maximum: 1 − H(f) / log E.

    With proportions ρ: the divergence from them in the same unit, Σ_e f_e log(f_e / ρ_e) / log E.

    >>> import torch
    >>> round(EntropyDeficit(0.25).ratio(torch.tensor([0.5, 0.5, 0.0, 0.0])).item(), 6)
    2.0
    """

    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """1 − `metrics.normalized_entropy`, or the divergence."""
        proportions = self._proportions(load)
        if proportions is None:
            return 1 - metrics.normalized_entropy(load)
        divergence = (torch.xlogy(load, load) - torch.xlogy(load, proportions)).sum(dim=-1)
        return divergence / math.log(load.shape[-1])


@dataclass(frozen=True, repr=False)
class RankVio(Goal):
    """The busiest of R expert-parallel ranks at most this far above its part.

    Args:
        ep_size: R ≥ 2, number of ranks; rank r holds the r-th block of E / R experts.

    Raises:
        ValueError: fewer than two ranks.

    >>> import torch
    >>> RankVio(0.5, ep_size=2).ratio(torch.tensor([0.5, 0.25, 0.25, 0.0])).item()
    1.0
    """

    ep_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ep_size < 2:
            raise ValueError(
                f"ep_size={self.ep_size}: give at least 2; one rank holds all experts."
            )

    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """`metrics.max_violation` of the ranks' loads.

        Raises:
            ValueError: E is not a multiple of the number of ranks.
        """
        num_experts = load.shape[-1]
        if num_experts % self.ep_size:
            raise ValueError(f"{num_experts} experts cannot be shared out to {self.ep_size} ranks.")
        proportions = self._proportions(load)
        of_ranks = None if proportions is None else proportions.view(self.ep_size, -1).sum(dim=-1)
        return metrics.max_violation(load.view(self.ep_size, -1).sum(dim=-1), of_ranks)


GOALS: tuple[type[Goal], ...] = (MaxVio, Gini, EntropyDeficit, RankVio)
