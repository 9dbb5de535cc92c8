"""What each method's imbalance would cost under expert parallelism, from the loads in its runs.

The loads are those of a run's last evaluation, over the whole of it. Single batches are less even,
so every number here is a lower bound; see `moebalance.metrics.expert_parallel` for the formulas.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moebalance.metrics.expert_parallel import Cost, Place, contiguous, greedy, imbalance_cost
from moebalance.report.estimates import Estimate, MethodSummary, last_evaluation
from moebalance.runlog import Run

EXPERT_SHARE = 0.5
"""Share of a balanced step that the experts are taken to need, unless told otherwise."""

_MOST_SIZES = 4


@dataclass(frozen=True)
class CostCell:
    """One method on one number of ranks, over its seeds.

    Attributes:
        rank_violation: RankVio with experts in their own order, contiguous on ranks.
        placed: RankVio with experts placed by that very load, the fullest first.
        wasted_share: share of machine time spent waiting, experts in their own order.
    """

    rank_violation: Estimate
    placed: Estimate
    wasted_share: Estimate


@dataclass(frozen=True)
class CostLine:
    """One method's row: a cell for each number of ranks, None where no load was logged."""

    method: MethodSummary
    cells: tuple[CostCell | None, ...]


@dataclass(frozen=True)
class CostTable:
    """The table, and the note under it."""

    ep_sizes: tuple[int, ...]
    expert_share: float
    lines: tuple[CostLine, ...]

    @property
    def caption(self) -> str:
        """What was assumed, in words."""
        return (
            "RankVio: how far the busiest rank lies above an even share where the experts are "
            "spread over this many ranks, mean over layers. Below it, what is left of it if the "
            "experts were placed by this very load, and the share of machine time that would be "
            f"spent waiting if a balanced step spent {self.expert_share:.0%} of its time on "
            "experts. From the load over the whole evaluation: single batches are less even, so "
            "these are lower bounds. On one rank imbalance costs almost nothing."
        )


def cost_table(
    methods: Sequence[MethodSummary], *, expert_share: float = EXPERT_SHARE
) -> CostTable | None:
    """What the methods' imbalance would cost, for the numbers of ranks that their experts allow.

    Args:
        methods: the methods of one section.
        expert_share: share of a balanced step's time that grows with the tokens a rank receives.

    Returns:
        The table; None if no run logged the load of an evaluation, or no number of ranks fits all.
    """
    loads = {id(run): found for m in methods for run in m.used if (found := _loads(run))}
    experts = {len(layer) for layers in loads.values() for layer in layers}
    sizes = _ep_sizes(math.gcd(*experts)) if experts else ()
    if not sizes:
        return None
    lines = []
    for method in methods:
        by_seed: dict[Any, list[list[list[float]]]] = {}
        for run in method.used:
            if id(run) in loads:
                seed = run.seed if run.seed is not None else str(run.path)
                by_seed.setdefault(seed, []).append(loads[id(run)])
        cells = (_cell(list(by_seed.values()), size, expert_share) for size in sizes)
        lines.append(CostLine(method, tuple(cells)))
    return CostTable(sizes, expert_share, tuple(lines))


def _cell(
    by_seed: Sequence[Sequence[list[list[float]]]], ep_size: int, expert_share: float
) -> CostCell | None:
    def costs(place: Place) -> list[list[Cost]]:
        return [
            [imbalance_cost(loads, ep_size, expert_share=expert_share, place=place) for loads in of]
            for of in by_seed
        ]

    as_they_are, placed = costs(contiguous), costs(greedy)
    violation = _estimate(as_they_are, lambda cost: cost.rank_violation)
    best = _estimate(placed, lambda cost: cost.rank_violation)
    wasted = _estimate(as_they_are, lambda cost: cost.wasted_share)
    if violation is None or best is None or wasted is None:
        return None
    return CostCell(violation, best, wasted)


def _estimate(by_seed: Sequence[Sequence[Cost]], read: Callable[[Cost], float]) -> Estimate | None:
    return Estimate.of(statistics.fmean(map(read, costs)) for costs in by_seed)


def _loads(run: Run) -> list[list[float]]:
    """Load (L, E) of the last evaluation; empty if there is none, or not of every layer."""
    layers = (last_evaluation(run) or {}).get("load")
    if not isinstance(layers, list) or not all(_is_load(layer) for layer in layers):
        return []
    return layers


def _is_load(layer: Any) -> bool:
    return (
        isinstance(layer, list)
        and all(isinstance(share, int | float) and share >= 0 for share in layer)
        and sum(layer) > 0
    )


def _ep_sizes(num_experts: int) -> tuple[int, ...]:
    """Numbers of ranks to show: powers of two as machines come in, or else any that divide.

    >>> _ep_sizes(64), _ep_sizes(60), _ep_sizes(15), _ep_sizes(1)
    ((8, 16, 32, 64), (2, 4), (3, 5, 15), ())
    """
    divisors = [size for size in range(2, num_experts + 1) if num_experts % size == 0]
    usual = [size for size in divisors if size & (size - 1) == 0]
    return tuple((usual or divisors)[-_MOST_SIZES:])
