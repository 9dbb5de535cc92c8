"""How even a load shall be: what `Targeted` steers a method's strength by.

A goal measures a load as its metric does and says by how much it misses, relative to what is
allowed: 0 at the goal, positive for a load that is less even, −1 for a perfectly even one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moebalance import metrics
from moebalance.balancers.base import check_positive
from moebalance.routing import Sums


@dataclass(frozen=True)
class Goal(ABC):
    """An upper bound on one measure of unevenness.

    Args:
        at_most: the bound, greater than 0, in the metric's own unit.
        load: "hard" for the assignments that top-k delivers, "soft" for the mean scores.

    Raises:
        ValueError: the bound is not a positive number, or there is no such load.
    """

    at_most: float
    load: Literal["hard", "soft"] = "hard"

    def __post_init__(self) -> None:
        check_positive("at_most", self.at_most, zero=False)
        if self.load not in ("hard", "soft"):
            raise ValueError(f"load={self.load!r}: must be 'hard' or 'soft'.")

    @abstractmethod
    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """Unevenness of a load that sums to 1: 0 for an even one."""

    def miss(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """(measure − at_most) / at_most."""
        return self.measure(load) / self.at_most - 1

    def of(self, sums: Sums) -> Float[Tensor, "E"]:
        """The load that the goal is about."""
        return sums.soft_load if self.load == "soft" else sums.hard_load

    @property
    def reads(self) -> str:
        """Which of the sums that is."""
        return "scores" if self.load == "soft" else "counts"


@dataclass(frozen=True)
class MaxVio(Goal):
    """The busiest expert at most so far above an even share: max_e f_e · E − 1.

    >>> import torch
    >>> MaxVio(0.5).miss(torch.tensor([0.5, 0.25, 0.25, 0.0])).item()
    1.0
    """

    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """`metrics.max_violation`."""
        return metrics.max_violation(load)


@dataclass(frozen=True)
class Gini(Goal):
    """Inequality at most so large.

    >>> import torch
    >>> round(Gini(0.25).miss(torch.tensor([0.5, 0.5, 0.0, 0.0])).item(), 6)
    1.0
    """

    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """`metrics.gini`."""
        return metrics.gini(load)


@dataclass(frozen=True)
class EntropyDeficit(Goal):
    """Entropy at most so far below its largest value: 1 − H(f) / log E.

    >>> import torch
    >>> round(EntropyDeficit(0.25).miss(torch.tensor([0.5, 0.5, 0.0, 0.0])).item(), 6)
    1.0
    """

    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """1 − `metrics.normalized_entropy`."""
        return 1 - metrics.normalized_entropy(load)


@dataclass(frozen=True)
class RankVio(Goal):
    """The busiest of R expert-parallel ranks at most so far above its share.

    Args:
        ranks: R; rank r holds the r-th block of E / R experts.

    >>> import torch
    >>> RankVio(0.5, ranks=2).miss(torch.tensor([0.5, 0.25, 0.25, 0.0])).item()
    0.0
    """

    ranks: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks < 2:
            raise ValueError(f"ranks={self.ranks}: give at least 2; one rank holds all experts.")

    def measure(self, load: Float[Tensor, "E"]) -> Float[Tensor, ""]:
        """`metrics.max_violation` of the ranks' loads.

        Raises:
            ValueError: the experts cannot be shared out equally.
        """
        num_experts = load.shape[-1]
        if num_experts % self.ranks:
            raise ValueError(f"{num_experts} experts cannot be shared out to {self.ranks} ranks.")
        return metrics.max_violation(load.view(self.ranks, -1).sum(dim=-1))


GOALS: tuple[type[Goal], ...] = (MaxVio, Gini, EntropyDeficit, RankVio)
