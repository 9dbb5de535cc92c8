"""The results of one recipe: numbers of the last evaluation by seed, and training curves.

A study is one file: a line about all of its runs, then a line a run. `keep.py` makes it.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moebalance.report.diagnosis.oscillation import Swing
from moebalance.report.estimates import Estimate, finite
from moebalance.report.methods import display_name
from moebalance.report.verdict import Difference, paired
from moebalance.runlog import Row

METRICS = {
    "loss": ("Validation loss", 3),
    "maxvio": ("MaxVio", 2),
    "seen_maxvio": ("MaxVio, training split", 2),
    "soft_maxvio": ("Soft MaxVio", 2),
    "soft_hard_gap": ("Soft–hard gap", 3),
    "gini": ("Gini", 3),
    "mi": ("Domain MI", 3),
    "purity": ("Purity", 3),
    "dead_experts": ("Dead experts", 1),
    "top_pair_lift": ("Lift of top pairs", 1),
    "router_similarity": ("Router similarity", 3),
    "churn": ("Churn", 2),
    "old_loss": ("Old text: loss", 3),
    "old_maxvio": ("Old text: MaxVio", 2),
    "aim_gap": ("Distance from the proportions", 3),
    "aim_maxvio": ("MaxVio over the proportions", 2),
    "group_maxvio": ("MaxVio of devices", 3),
}
"""Title and decimals of every number that the pages show."""
_DIGITS = 6


@dataclass(frozen=True)
class Result:
    """One run, as far as the evidence needs it.

    Attributes:
        method: its word, for example `"phi+loss-free"`.
        setting: the method as the recipe writes it, for example `"phi(strength=0.01)"`.
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

    def families(self) -> list[str]:
        """The methods that were run, without their strengths, in the recipe's order."""
        return list(dict.fromkeys(map(family, self.settings())))

    def seeds(self) -> list[int]:
        """The seeds that were run."""
        return sorted({result.seed for result in self.results})

    def batchings(self) -> list[str]:
        """The kinds of micro-batch, in the recipe's order."""
        return list(dict.fromkeys(result.batching for result in self.results))

    def only(self, batching: str) -> Study:
        """The study of one kind of micro-batch."""
        found = tuple(result for result in self.results if result.batching == batching)
        return replace(self, results=found)

    def only_setting(self, setting: str) -> Study:
        """The study of one setting."""
        return replace(self, results=tuple(self.runs(setting)))

    def runs(self, setting: str) -> list[Result]:
        """The runs of a setting."""
        return [result for result in self.results if result.setting == setting]

    def setting(self, name: str) -> str:
        """The setting of a family.

        Raises:
            KeyError: none was run.
        """
        if found := self.of([name]):
            return found[0]
        raise KeyError(f"{self.name} has no setting of {name!r}; it has {self.settings()}.")

    def of(self, names: Iterable[str]) -> list[str]:
        """The settings of these families, as far as they were run."""
        there = {family(setting): setting for setting in reversed(self.settings())}
        return [there[name] for name in names if name in there]

    def method(self, setting: str) -> str:
        """The word of its method."""
        return self.runs(setting)[0].method

    def title(self, setting: str) -> str:
        """The name of its method in words."""
        return display_name(self.method(setting))

    def by_seed(self, setting: str, metric: str) -> dict[int, float]:
        """A number of the last evaluation, for each seed."""
        found = {result.seed: finite(result.final, metric) for result in self.runs(setting)}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, setting: str, metric: str) -> float:
        """Its mean over seeds; nan without any."""
        values = self.by_seed(setting, metric).values()
        return statistics.fmean(values) if values else float("nan")

    def estimate(self, setting: str, metric: str) -> Estimate | None:
        """Its mean and standard deviation over seeds."""
        return Estimate.of(self.by_seed(setting, metric).values())

    def less(self, ours: str, theirs: str, metric: str) -> Difference | None:
        """Ours less theirs, paired over the seeds that both have."""
        return paired(self.by_seed(ours, metric), self.by_seed(theirs, metric))

    def curve(self, setting: str, name: str) -> tuple[Sequence[float], list[float]]:
        """Steps, and the mean over seeds of a training curve."""
        curves = [result.curve for result in self.runs(setting)]
        columns = zip(*(curve[name] for curve in curves), strict=True)
        return curves[0]["step"], [statistics.fmean(values) for values in columns]

    def tokens_a_step(self) -> int:
        """Tokens of a step in every run."""
        recipe = self.about["recipe"]
        train = recipe["train"]
        return int(train["batch_size"] * train["accumulation"] * recipe["data"]["seq_len"])


Studies = Mapping[str, Study]
"""Committed results by the name of their recipe."""


def family(setting: str) -> str:
    """A method without the numbers that say how strongly it acts and how fast it forgets.

    >>> family("phi(load='hard', strength=0.01)"), family("loss-free(speed=0.001)")
    ("phi(load='hard')", 'loss-free')
    >>> family("phi(strength=0.032, rate=0.1)+loss-free"), family("phi(strength=1, unit='paper')")
    ('phi+loss-free', 'phi')
    """
    bare = re.sub(r"(, )?\b((strength|speed|rate)=[0-9.e-]+|unit='paper')", "", setting)
    return bare.replace("(, ", "(").replace("()", "")


def read(file: Path) -> Study:
    """Read a study that `write` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a study.
    """
    about, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    if "study" not in about:
        raise ValueError(f"{file} is not a study's results: its first line must name the study.")
    results = []
    for row in rows:
        swings = row.pop("swing")
        row["swing"] = None if swings is None else tuple(Swing(**swing) for swing in swings)
        row["evals"] = tuple(row["evals"])
        results.append(Result(**row))
    return Study(about.pop("study"), about, tuple(results))


def write(study: Study, file: Path) -> None:
    """Write a study: a line about it, then a line a run."""
    lines = [{"study": study.name, **study.about}]
    for result in study.results:
        swings = result.swing and [swing._asdict() for swing in result.swing]
        lines.append({**vars(result), "swing": swings})
    file.parent.mkdir(parents=True, exist_ok=True)
    text = (json.dumps(_rounded(line), separators=(",", ":")) + "\n" for line in lines)
    file.write_text("".join(text), encoding="utf-8")


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.{_DIGITS}g}")
        case Mapping():
            return {key: _rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
    return value
