"""Claim 5: stable balance over training, and after a change of text."""

from __future__ import annotations

import statistics
from typing import Any

from evidence.chapter import Finding, Verdict, cells, claim, noise, table, text
from evidence.chapters.rivals import RECOMMENDED
from evidence.figures import GUIDE, Panel, Series, draw
from evidence.study import Result, Studies, Study
from moebalance.report.canvas import look
from moebalance.report.methods import display_name

_SHOWN = ("none", "switch", "loss-free", "phi", RECOMMENDED)


@claim(
    slug="stability",
    title="Stability",
    text="Under φ-balancing the Gini coefficient of the load falls to 0.002, fifty times below the "
    "value under an auxiliary loss (paper, Fig. 3: E = 64, 10 000 steps).",
    rule="*holds* if φ alone has the lowest mean Gini of the single methods, *in part* if its Gini "
    "is less than half of the value without balancing.",
    needs=("rivals", "shift"),
)
def chapter(studies: Studies) -> Finding:
    """From the curves of the rivals, and from runs whose text changes half-way."""
    steady, shifted = studies["rivals"], studies["shift"]
    gini = {name: steady.mean(steady.setting(name), "gini") for name in _SHOWN}
    lowest = min((name for name in gini if name != RECOMMENDED), key=gini.__getitem__)
    verdict = Verdict.HOLDS if lowest == "phi" else Verdict.NOT_HERE
    if verdict is Verdict.NOT_HERE and gini["phi"] < gini["none"] / 2:
        verdict = Verdict.IN_PART
    said = ", ".join(f"{display_name(name)} {value:.3f}" for name, value in gini.items())
    return Finding(
        verdict,
        f"Gini of the load at the end, mixed text: {said}. Runs here have "
        f"{steady.about['steps']} steps, not 10 000.",
        noise=noise({"mixed": steady}, "gini"),
        body=text(
            "### Churn",
            "Churn is the fraction of held-out tokens whose set of experts changed since the "
            "evaluation 500 steps before. Mixed text:",
            _churn(steady),
            "### A change of text",
            "Half-way the text changes from code and prose to tables and names. The table has "
            "MaxVio of training batches, each a mean over a fortieth of the run: before the "
            "change, at the peak within 200 steps after it, and at the end. *Steps to recover* "
            "says when MaxVio is back within a quarter of the value before; a dash says never. "
            "Churn is over the last 500 steps.",
            _change(shifted),
        ),
        figures={
            "curves": (_steady(steady), "Training batches, mixed text, mean over seeds."),
            "shift": (_shift(shifted), "The text changes half-way; mean over seeds."),
        },
    )


def _churn(study: Study) -> str:
    rows = []
    for setting in study.of(_SHOWN):
        runs = [[e["churn"] for e in run.evals if "churn" in e] for run in study.runs(setting)]
        means = [statistics.fmean(values) for values in zip(*runs, strict=True)]
        rows.append([f"`{setting}`", *(f"{mean:.2f}" for mean in means)])
    steps = [f"step {row['step']}" for row in study.results[0].evals if "churn" in row]
    return table(["Method", *steps], rows)


def _change(study: Study) -> str:
    rows = []
    for setting in study.settings():
        found = [recovery(run) for run in study.runs(setting)]
        digits = {"before": 2, "peak": 2, "after": 2, "recovery": 0}
        means = [_mean([each[key] for each in found], n) for key, n in digits.items()]
        rows.append([f"`{setting}`", *means, *cells(study, setting, ["churn"])])
    return table(["Method", "Before", "Peak", "At the end", "Steps to recover", "Churn"], rows)


def recovery(run: Result) -> dict[str, float | None]:
    """MaxVio before, at the peak and at the end of a run whose text changes half-way.

    `recovery` is the number of steps after the change until MaxVio is back within a quarter of
    the value before, None if it never is. A window's step is where it ends.
    """
    steps, values = run.curve["step"], run.curve["maxvio"]
    half = steps[-1] // 2
    before = statistics.fmean(
        v for s, v in zip(steps, values, strict=True) if half - 100 < s <= half
    )
    after = [(s - half, v) for s, v in zip(steps, values, strict=True) if s > half]
    peak_at, peak = max(((s, v) for s, v in after if s <= 200), key=lambda point: point[1])
    back = next((s for s, v in after if s >= peak_at and v <= 1.25 * before), None)
    return {"before": before, "peak": peak, "after": after[-1][1], "recovery": back}


def _mean(values: list[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if len(known) == len(values) else "–"


def _lines(study: Study, curve: str) -> list[Series]:
    return [
        Series(
            study.title(setting),
            *study.curve(setting, curve),
            {"color": look(study.method(setting))["color"]},
        )
        for setting in study.of(_SHOWN)
    ]


def _steady(study: Study) -> Any:
    shown = [
        Panel(title, "step", f"{title} of a training batch", _lines(study, curve))
        for curve, title in (("gini", "Gini"), ("maxvio", "MaxVio"))
    ]
    return draw(shown, columns=5)


def _shift(study: Study) -> Any:
    half = study.results[0].curve["step"][-1] / 2
    title, y = f"A change of text at step {half:.0f}", "MaxVio of a training batch"
    panel = Panel(title, "step", y, _lines(study, "maxvio"), log="y")
    figure = draw([panel], columns=5, height=3.2)
    figure.axes[0].axvline(half, color=GUIDE, linewidth=1, linestyle=":")
    return figure
