"""What is kept of a study: one file, a line about all of its runs and then a line a run.

A run log holds hundreds of kB, most of it a row for each step. Kept of it are the scalars of every
evaluation, with what their loads say of shares and groups that the study is about, and the
training curves as means over windows of steps.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.aims import Aim, aim_of
from moebalance.report.diagnosis.oscillation import Swing, swing
from moebalance.report.estimates import finite, is_whole
from moebalance.runlog import Row, Run, find_runs

CURVES = ("loss", "maxvio", "gini", "soft_maxvio", "rate", "multiplier")
_POINTS = 40
_DIGITS = 6
_TOP_PAIRS = 0.05


@dataclass(frozen=True)
class Result:
    """One run, as far as the evidence needs it.

    Attributes:
        method: its word, e.g. `"phi+loss-free"`.
        setting: the method as the recipe wrote it, e.g. `"phi(strength=0.01)"`.
        seed: of weights and data order.
        batching: kind of micro-batch.
        evals: the scalars of every evaluation, `step` among them.
        curve: training curves by name, as means over windows; `step` is where a window ends.
        swing: how the loads moved from step to step, by layer; None unless every step was logged.
    """

    method: str
    setting: str
    seed: int
    batching: str
    evals: tuple[Row, ...]
    curve: Mapping[str, Sequence[float]]
    swing: tuple[Swing, ...] | None = None

    @property
    def final(self) -> Row:
        """The scalars of the last evaluation."""
        return self.evals[-1]


@dataclass(frozen=True)
class Study:
    """All runs of one recipe, and what they have in common."""

    name: str
    about: Mapping[str, Any]
    results: tuple[Result, ...]

    def settings(self) -> list[str]:
        """The settings that were run, in the recipe's order."""
        return list(dict.fromkeys(result.setting for result in self.results))

    def seeds(self) -> list[int]:
        """The seeds that were run."""
        return sorted({result.seed for result in self.results})

    def select(
        self, setting: str | None = None, *, batching: str | None = None
    ) -> tuple[Result, ...]:
        """The runs of a setting, of a kind of micro-batch, or of both."""
        return tuple(
            result
            for result in self.results
            if setting in (None, result.setting) and batching in (None, result.batching)
        )

    def by_seed(
        self, setting: str, metric: str, *, batching: str | None = None
    ) -> dict[int, float]:
        """The last evaluation's number for each seed."""
        found = {r.seed: finite(r.final, metric) for r in self.select(setting, batching=batching)}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, setting: str, metric: str, *, batching: str | None = None) -> float:
        """Its mean over seeds; nan without any."""
        values = self.by_seed(setting, metric, batching=batching).values()
        return statistics.fmean(values) if values else float("nan")


def gather(name: str, folder: Path, settings: Iterable[str], file: Path) -> Study:
    """Thin the run logs of a study into one file.

    Args:
        name: of the study, its recipe's.
        folder: that `compare` wrote to.
        settings: the recipe's methods, in their order.
        file: where to.

    Raises:
        FileNotFoundError: there are no logs.
        ValueError: a run is not whole: a study is kept as a whole or not at all.
    """
    from moebalance.lab.compare import run_name

    settings = tuple(settings)
    runs, aim = find_runs(folder), aim_of(settings)
    named = {run_name(s, r.seed or 0): s for s in settings for r in runs}
    found = []
    for run in runs:
        setting = named.get(run.path.parent.name)
        if setting is None:
            continue  # of an earlier version of the recipe
        if not is_whole(run):
            raise ValueError(f"{run.path} is not whole ({run.status}): run the study again first.")
        found.append(thin(run, setting, aim))
    order = list(dict.fromkeys(settings))
    found.sort(key=lambda r: (r.batching, order.index(r.setting), r.seed))
    commits = sorted({str(run.header["commit"]) for run in runs if run.path.parent.name in named})
    study = Study(name, {**about(runs[0]), "commits": commits}, tuple(found))
    write(study, file)
    return study


def thin(run: Run, setting: str, aim: Aim | None = None) -> Result:
    """Keep of a run what the evidence needs."""
    last, aim = run.evals[-1], aim or Aim()
    evals = [_scalars(row) | aim.judge(row["load"]) for row in run.evals]
    evals[-1] |= _coactivation(last)
    return Result(
        method=run.method,
        setting=setting,
        seed=run.seed or 0,
        batching=run.batching,
        evals=tuple(evals),
        curve=_windows(run.steps),
        swing=_swings(run),
    )


def write(study: Study, file: Path) -> None:
    """Write a study: a line about it, then a line a run."""
    lines = [{"study": study.name, **study.about}]
    for result in study.results:
        lines.append(
            {**vars(result), "swing": result.swing and [s._asdict() for s in result.swing]}
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(json.dumps(_rounded(line), separators=(",", ":")) + "\n" for line in lines),
        encoding="utf-8",
    )


def read(file: Path) -> Study:
    """Read a study that `write` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a study.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not rows or "study" not in rows[0]:
        raise ValueError(f"{file} is not a study's results: its first line must name the study.")
    about = dict(rows[0])
    results = []
    for row in rows[1:]:
        swings = row.pop("swing")
        kept = None if swings is None else tuple(Swing(**s) for s in swings)
        row["evals"] = tuple(row["evals"])
        results.append(Result(**row, swing=kept))
    return Study(about.pop("study"), about, tuple(results))


def about(run: Run) -> dict[str, Any]:
    """What all runs of a study have in common: model, data, training, versions."""
    recipe = run.header["recipe"]
    kept = {key: recipe[key] for key in ("model", "data", "train")}
    keys = ("steps", "versions", "model", "data")
    return {"recipe": kept, **{key: run.header[key] for key in keys}}


def _scalars(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "tokens"}


def _coactivation(row: Row) -> dict[str, float]:
    """Mean lift of the pairs of experts that most often serve a token together."""
    tops = []
    for lifts in row.get("coactivation", []):
        count = max(1, round(_TOP_PAIRS * len(lifts)))
        tops.append(statistics.fmean(sorted(lifts)[-count:]))
    return {"top_pair_lift": statistics.fmean(tops)} if tops else {}


def _windows(steps: Sequence[Row]) -> dict[str, list[float]]:
    width = max(1, len(steps) // _POINTS)
    parts = [steps[i : i + width] for i in range(0, len(steps) - width + 1, width)]
    curve: dict[str, list[float]] = {"step": [part[-1]["step"] for part in parts]}
    for name in CURVES:
        values = [[v for row in part if (v := finite(row, name)) is not None] for part in parts]
        if all(values):
            # Four digits are what a picture can show.
            curve[name] = [float(f"{statistics.fmean(part):.4g}") for part in values]
    return curve


def _swings(run: Run) -> tuple[Swing, ...] | None:
    late = run.snapshots[len(run.snapshots) // 2 :]
    if len(run.snapshots) < run.last_step or len(late) < 2:
        return None
    layers = len(late[0]["load"])
    return tuple(swing([row["load"][layer] for row in late]) for layer in range(layers))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
