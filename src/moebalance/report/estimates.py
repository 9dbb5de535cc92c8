"""From runs to numbers: each method's metrics over its seeds, mean ± sample standard deviation.

A run counts with its last evaluation, and only if that was made at the run's last planned step:
a run cut short is never averaged with whole ones. An evaluation before the first step says where a
fine-tuning run began, never where it ended. A method with no whole run keeps what its runs
have, marked ``partial``, and takes part in no comparison.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moebalance.report.methods import Look, look, looks
from moebalance.report.naming import by_setting, names
from moebalance.report.parts import balances, parts_of
from moebalance.runlog import Row, Run


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its sample standard deviation (None for one seed), and their number."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate | None:
        """The estimate from one value a seed, or None without any.

        >>> Estimate.of([1.0, 3.0])
        Estimate(mean=2.0, sd=1.4142135623730951, n=2)
        """
        known = list(values)
        if not known:
            return None
        return cls(
            statistics.fmean(known),
            statistics.stdev(known) if len(known) > 1 else None,
            len(known),
        )

    def text(self, digits: int) -> str:
        """``mean ± sd`` with that many decimals; the mean alone for one seed."""
        tail = "" if self.sd is None else f" ± {number(self.sd, digits)}"
        return number(self.mean, digits) + tail


@dataclass(frozen=True)
class MethodSummary:
    """One method (one set of hyper-parameters) under one batching mode, over its seeds.

    ``values[metric][seed]`` is what ``estimates[metric]`` summarises; a metric that no run has is
    in neither. ``before`` is the same from the evaluations before the first step, where there are
    any. ``used`` are the runs behind them. ``key`` is the method's word, with a number for its
    second setting and those after it. ``balances`` says whether the method puts pressure on
    the load, None if the log does not say.
    """

    method: str
    method_repr: str
    key: str
    label: str
    look: Look
    balances: bool | None
    runs: tuple[Run, ...]
    used: tuple[Run, ...]
    partial: bool
    values: Mapping[str, Mapping[Any, float]] = field(default_factory=dict)
    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    before: Mapping[str, Estimate] = field(default_factory=dict)
    step_time_s: float | None = None
    step_time_ratio: float | None = None

    @property
    def seeds(self) -> int:
        """How many there are behind the numbers."""
        return len({_seed(run) for run in self.used})


def method_summaries(
    runs: Sequence[Run], metrics: Iterable[str], among: Sequence[Run] = ()
) -> list[MethodSummary]:
    """Group runs of one batching mode by method and hyper-parameters, in page order.

    Args:
        runs: runs that share a batching mode.
        metrics: the keys of the evaluation row to summarise.
        among: all runs of the report, so that a setting has one name and look in all of it.
    """
    known, groups = by_setting(among or runs), by_setting(runs)
    order = list(looks(method for method, _ in known))
    keys = sorted(known, key=lambda key: (order.index(key[0]), key[1]))
    labels = names({key: known[key] for key in keys})
    rivals = {key: [other for other in keys if other[0] == key[0]] for key in keys}
    times = {key: _step_times_s(groups.get(key, ())) for key in keys}
    baseline = next((times[key] for key in keys if key[0] == "none"), {})
    metrics = tuple(metrics)
    return [
        _summary(
            key,
            str(labels[key]),
            rivals[key].index(key),
            groups[key],
            metrics,
            times_s=times[key],
            baseline_s=baseline,
        )
        for key in keys
        if key in groups
    ]


def is_whole(run: Run) -> bool:
    """Whether the run has an evaluation at its last planned step."""
    planned, last = run.header.get("steps"), last_evaluation(run)
    return last is not None and (not isinstance(planned, int) or bool(last["step"] >= planned))


def last_evaluation(run: Run) -> Row | None:
    """The run's last evaluation after training began, or None."""
    return run.evals[-1] if run.evals and run.evals[-1]["step"] > 0 else None


def first_evaluation(run: Run) -> Row | None:
    """The run's evaluation before its first step, or None."""
    return run.evals[0] if run.evals and run.evals[0]["step"] == 0 else None


def finite(row: Row, key: str) -> float | None:
    """The row's number, or None where it is missing, null or not finite."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: float, digits: int) -> str:
    """A number with a true minus sign, and no minus on zero.

    >>> number(-0.0004, 3), number(-1.5, 1)
    ('0.000', '−1.5')
    """
    text = f"{value:.{digits}f}"
    return text.replace("-", "" if float(text) == 0 else "−")


def _summary(
    key: tuple[str, str],
    label: str,
    setting: int,
    runs: list[Run],
    metrics: tuple[str, ...],
    *,
    times_s: Mapping[Any, float],
    baseline_s: Mapping[Any, float],
) -> MethodSummary:
    whole = [run for run in runs if is_whole(run)]
    used = whole or [run for run in runs if last_evaluation(run)]
    values = _values(used, metrics, last_evaluation)
    return MethodSummary(
        method=key[0],
        method_repr=key[1],
        key=f"{key[0]}:{setting}" if setting else key[0],
        label=label,
        look=look(key[0], setting),
        balances=balances(parts_of(runs[0])),
        runs=tuple(runs),
        used=tuple(used),
        partial=not whole,
        values=values,
        estimates=_estimates(values),
        before=_estimates(_values(used, metrics, first_evaluation)),
        step_time_s=statistics.median(times_s.values()) if times_s else None,
        step_time_ratio=_ratio(times_s, baseline_s),
    )


def _values(
    runs: Iterable[Run], metrics: Iterable[str], evaluation: Callable[[Run], Row | None]
) -> dict[str, dict[Any, float]]:
    rows = [(run, row) for run in runs if (row := evaluation(run)) is not None]
    return {metric: by_seed for metric in metrics if (by_seed := _by_seed(rows, metric))}


def _estimates(values: Mapping[str, Mapping[Any, float]]) -> dict[str, Estimate]:
    return {m: e for m, by_seed in values.items() if (e := Estimate.of(by_seed.values()))}


def _step_times_s(runs: Iterable[Run]) -> dict[Any, float]:
    """Of runs that took turns on one machine; of others a step's time says how busy that was."""
    timed = [run for run in runs if run.header.get("interleaved") is True]
    return _by_seed([(run, {"step_time_s": run.step_time_s}) for run in timed], "step_time_s")


def _ratio(times: Mapping[Any, float], baseline: Mapping[Any, float]) -> float | None:
    """Median over seeds, whose runs were trained one after the other; else that of the medians.

    A machine that was busy while one seed was trained so weighs on both sides of its ratio.
    """
    pairs = [times[seed] / baseline[seed] for seed in times if baseline.get(seed)]
    if pairs:
        return statistics.median(pairs)
    if not (times and baseline):
        return None
    among = statistics.median(baseline.values())
    return statistics.median(times.values()) / among if among else None


def _by_seed(rows: Iterable[tuple[Run, Row]], metric: str) -> dict[Any, float]:
    """One value a seed: two runs with one seed are one sample, runs without seed one each."""
    found: dict[Any, list[float]] = {}
    for run, row in rows:
        value = finite(row, metric)
        if value is not None:
            found.setdefault(_seed(run), []).append(value)
    return {seed: statistics.fmean(values) for seed, values in found.items()}


def _seed(run: Run) -> int | str:
    return run.seed if run.seed is not None else str(run.path)
