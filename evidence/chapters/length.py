"""Claim 14, our own: the longer a model trains, the less balance costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from evidence.chapter import Finding, Verdict, claim, noise, table, text
from evidence.chapters.rivals import RECOMMENDED
from evidence.figures import GUIDE, Panel, Series, draw
from evidence.study import Studies, Study
from moebalance.report.canvas import look

_BALANCED = ("switch", "loss-free", "phi", RECOMMENDED)


@claim(
    slug="length",
    title="Training length",
    text="Our own claim: the longer a model trains, the less balance costs in loss, and the more "
    "even φ alone becomes.",
    rule="*holds* if from the first evaluation to the last the loss of every balanced method, less "
    "the loss without balancing, falls, and MaxVio of φ alone falls too; *in part* if one of both "
    "does.",
    needs=("longer",),
)
def chapter(studies: Studies) -> Finding:
    """From evaluations during one long training."""
    study = studies["longer"]
    cheaper = [gap[-1] < gap[0] for gap in (gaps(study, name) for name in _BALANCED)]
    vios = evaluations(study, "phi", "maxvio")
    found = (all(cheaper), vios[-1] < vios[0])
    verdict = Verdict.IN_PART if any(found) else Verdict.NOT_HERE
    steps = [round(step) for step in evaluations(study, "none", "step")]
    costs = "; ".join(
        f"{study.title(name)} {_signed(gap[0])} to {_signed(gap[-1])}"
        for name in _BALANCED
        for gap in [gaps(study, name)]
    )
    return Finding(
        Verdict.HOLDS if all(found) else verdict,
        f"Loss less the loss without balancing, from step {steps[0]} to step {steps[-1]}: {costs}. "
        f"MaxVio of φ alone: {vios[0]:.2f} to {vios[-1]:.2f}.",
        noise=noise({"mixed": study}, "loss", "maxvio"),
        body=text(
            "The learning rate falls to zero at the end of a run, so a loss half-way is not the "
            "loss of a run half as long. Compare methods at a step, not steps.",
            *(f"**{title}**\n\n{_table(study, metric)}" for metric, title in _SHOWN.items()),
        ),
        figures={"course": (_figure(study), "Loss and MaxVio on held-out text during training.")},
    )


_SHOWN = {"loss": "Validation loss", "maxvio": "MaxVio"}


def evaluations(study: Study, setting: str, metric: str) -> list[float]:
    """A number at each evaluation, mean over seeds."""
    runs = [[float(row[metric]) for row in run.evals] for run in study.runs(setting)]
    return [statistics.fmean(values) for values in zip(*runs, strict=True)]


def gaps(study: Study, setting: str) -> list[float]:
    """Its loss less the loss without balancing, at each evaluation."""
    ours, none = (evaluations(study, name, "loss") for name in (setting, "none"))
    return [a - b for a, b in zip(ours, none, strict=True)]


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _table(study: Study, metric: str) -> str:
    steps = evaluations(study, "none", "step")
    rows = [
        [f"`{name}`", *(f"{value:.2f}" for value in evaluations(study, name, metric))]
        for name in ("none", *_BALANCED)
    ]
    return table(["Method", *(f"step {step:.0f}" for step in steps)], rows)


def _figure(study: Study) -> Any:
    costs = [_line(study, name, gaps(study, name)) for name in _BALANCED]
    vios = [_line(study, name, evaluations(study, name, "maxvio")) for name in ("none", *_BALANCED)]
    shown = [
        Panel("Loss", "step", "loss − loss without balancing", costs),
        Panel("Balance", "step", "MaxVio", vios, log="y"),
    ]
    figure = draw(shown, columns=5)
    figure.axes[0].axhline(0, color=GUIDE, linewidth=1)
    return figure


def _line(study: Study, setting: str, values: Sequence[float]) -> Series:
    style = {"color": look(study.method(setting))["color"], "marker": "o", "markersize": 3}
    return Series(study.title(setting), evaluations(study, setting, "step"), values, style)
