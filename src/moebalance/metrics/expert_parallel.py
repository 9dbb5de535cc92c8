"""The cost of imbalance when experts are spread over ranks (expert parallelism).

E experts on R ranks, E/R on each. Each MoE layer waits for the rank with the most tokens:

    RankVio = max_r load_r · R − 1,    load_r = Σ_{e on r} f_e,    f_e = load_e / Σ_j load_j.

Let f be the fraction of a balanced step's time that grows with the tokens a rank receives. Relative
to a balanced step, a step takes

    S = 1 + f · mean over layers of RankVio,

and machines wait for the fraction 1 − 1/S of the time. A rank averages over its experts, so RankVio
is at most MaxVio; they are equal with one expert on each rank. With one rank nobody waits.

A load averaged over batches gives a lower bound, because each batch has its own busiest rank. Plain
numbers only, so that a report can compute this from a run log.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Which rank holds which expert; all ranks hold equally many.

    Args:
        rank_of: (E,) the rank of every expert, in 0..ep_size − 1.
        ep_size: R, the number of ranks.

    Raises:
        ValueError: a rank out of range, or ranks with unequal numbers of experts.

    >>> Placement((0, 1, 1, 0), ep_size=2).experts_on(1)
    (1, 2)
    """

    rank_of: tuple[int, ...]
    ep_size: int

    def __post_init__(self) -> None:
        each = _experts_per_rank(len(self.rank_of), self.ep_size)
        if Counter(self.rank_of) != dict.fromkeys(range(self.ep_size), each):
            raise ValueError(
                f"Placement(rank_of={self.rank_of}, ep_size={self.ep_size}): each of the ranks "
                f"0..{self.ep_size - 1} must hold {each} experts."
            )

    def experts_on(self, rank: int) -> tuple[int, ...]:
        """The experts on a rank."""
        return tuple(expert for expert, at in enumerate(self.rank_of) if at == rank)


Place = Callable[[Sequence[float], int], Placement]
"""A rule of placement: takes a layer's load (E,) and the number of ranks."""


@dataclass(frozen=True)
class Cost:
    """Cost of the imbalance of some layers on R ranks.

    Attributes:
        rank_violation: RankVio, mean over layers; 0 is even.
        step_factor: S, time of a step relative to a balanced one; at least 1.
        wasted_share: 1 − 1/S, the fraction of machine time spent waiting.
    """

    rank_violation: float
    step_factor: float
    wasted_share: float


def contiguous(load: Sequence[float], ep_size: int) -> Placement:
    """Experts 0 … E/R − 1 on rank 0, the next ones on rank 1, …: the frameworks' default.

    >>> contiguous([1.0, 1.0, 1.0, 1.0], 2).rank_of
    (0, 0, 1, 1)
    """
    each = _experts_per_rank(len(load), ep_size)
    return Placement(tuple(expert // each for expert in range(len(load))), ep_size)


def shuffled(load: Sequence[float], ep_size: int, *, seed: int) -> Placement:
    """Experts on random ranks, the same for the same seed.

    >>> sorted(shuffled([1.0] * 4, 2, seed=0).rank_of)
    [0, 0, 1, 1]
    """
    ranks = list(contiguous(load, ep_size).rank_of)
    random.Random(seed).shuffle(ranks)
    return Placement(tuple(ranks), ep_size)


def greedy(load: Sequence[float], ep_size: int) -> Placement:
    """Largest load first, each onto the least loaded rank with room.

    It sees the same load that it is judged by, unlike a placement chosen in advance. It is nearly
    the best placement, but not always.

    >>> greedy([4.0, 2.0, 1.0, 1.0], 2).rank_of
    (0, 1, 1, 0)
    """
    shares = _shares(load)
    each = _experts_per_rank(len(load), ep_size)
    carried, held = [0.0] * ep_size, [0] * ep_size
    rank_of = [0] * len(load)
    for expert in sorted(range(len(load)), key=lambda e: -shares[e]):
        open_ranks = [rank for rank in range(ep_size) if held[rank] < each]
        rank = min(open_ranks, key=lambda r: carried[r])
        rank_of[expert] = rank
        carried[rank] += shares[expert]
        held[rank] += 1
    return Placement(tuple(rank_of), ep_size)


def rank_violation(load: Sequence[float], placement: Placement) -> float:
    """RankVio, the excess of the busiest rank: max_r load_r · R − 1, in [0, R − 1].

    0 is even. At 1 the busiest rank has twice an even load, and on average the others wait as long
    as they work.

    Args:
        load: (E,) counts or fractions of one layer's experts.
        placement: the ranks of the experts.

    Raises:
        ValueError: another number of experts than was placed, or a load that is negative, not
            finite or zero for all.

    >>> rank_violation([4.0, 2.0, 1.0, 1.0], contiguous([4.0, 2.0, 1.0, 1.0], 2))
    0.5
    """
    if len(load) != len(placement.rank_of):
        raise ValueError(
            f"A load of {len(load)} experts, but a placement of {len(placement.rank_of)}: make the "
            "placement for this load."
        )
    by_rank: list[list[float]] = [[] for _ in range(placement.ep_size)]
    for rank, share in zip(placement.rank_of, _shares(load), strict=True):
        by_rank[rank].append(share)
    # Rounding may put an even load an ulp below 0.
    return max(max(map(math.fsum, by_rank)) * placement.ep_size - 1, 0.0)


def imbalance_cost(
    loads: Sequence[Sequence[float]],
    ep_size: int,
    *,
    expert_share: float,
    place: Place = contiguous,
) -> Cost:
    """Cost of the imbalance of a model's layers on `ep_size` ranks.

    Args:
        loads: (L, E) hard load of every MoE layer, counts or fractions.
        ep_size: R, the number of ranks that hold the experts; a divisor of E.
        expert_share: f, the fraction of a balanced step's time that grows with the tokens a rank
            receives: the experts' work, and sending tokens to them.
        place: how each layer's experts are placed.

    Raises:
        ValueError: no layer, f outside [0, 1], or a reason of `rank_violation`.

    >>> imbalance_cost([[4, 2, 1, 1], [2, 2, 2, 2]], 2, expert_share=0.4)
    Cost(rank_violation=0.25, step_factor=1.1, wasted_share=0.09090909090909091)
    """
    if not loads:
        raise ValueError("imbalance_cost needs the load of at least one layer.")
    if not 0 <= expert_share <= 1:
        raise ValueError(
            f"expert_share={expert_share}: must lie in [0, 1]. It is the experts' fraction of a "
            "balanced step's time."
        )
    each = [rank_violation(load, place(load, ep_size)) for load in loads]
    violation = math.fsum(each) / len(each)
    waiting = expert_share * violation
    return Cost(violation, 1 + waiting, waiting / (1 + waiting))


def _shares(load: Sequence[float]) -> list[float]:
    total = math.fsum(load)
    if not (math.isfinite(total) and total > 0 and min(load) >= 0):
        raise ValueError(
            f"A load of {len(load)} experts sums to {total}, with minimum "
            f"{min(load, default=math.nan)}: give counts or fractions, at least 0 and not all 0."
        )
    return [value / total for value in load]


def _experts_per_rank(num_experts: int, ep_size: int) -> int:
    if ep_size < 1 or num_experts < 1 or num_experts % ep_size:
        possible = [size for size in range(1, num_experts + 1) if num_experts % size == 0]
        raise ValueError(
            f"{num_experts} experts on {ep_size} ranks: every rank holds equally many, so the "
            f"number of ranks must be one of {possible}."
        )
    return num_experts // ep_size
