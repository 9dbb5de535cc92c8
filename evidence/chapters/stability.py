"""Claim 5: stable balance over training, and after a change of text."""

from __future__ import annotations

import statistics
from typing import Any

from evidence.chapter import Chapter, Studies, Verdict, estimate, table
from evidence.chapters.potentials import mean_curve
from evidence.chapters.rivals import setting_of
from evidence.choose import family
from evidence.figures import legend_below, logarithmic, look, panels, titles
from evidence.results import Result, Study
from moebalance.report.methods import display_name

_SHOWN = ("none", "switch", "loss-free", "phi", "phi+loss-free")


def chapter(studies: Studies) -> Chapter:
    """From the curves of the rivals, and from runs whose text changes half-way."""
    steady, shifted = studies["rivals"], studies["shift"]
    gini = {name: steady.mean(setting_of(steady, name), "gini") for name in _SHOWN}
    lowest = min((name for name in gini if name != "phi+loss-free"), key=gini.__getitem__)
    verdict = Verdict.HOLDS if lowest == "phi" else Verdict.NOT_HERE
    if verdict is Verdict.NOT_HERE and gini["phi"] < gini["none"] / 2:
        verdict = Verdict.IN_PART
    rows = [
        [
            f"`{setting}`",
            *(_words(_mean(shifted, setting, key)) for key in ("before", "peak", "after")),
            _words(_mean(shifted, setting, "recovery"), 0),
            estimate(shifted, setting, "churn", 2),
        ]
        for setting in shifted.settings()
    ]
    churn = [
        [f"`{setting_of(steady, name)}`", *_churn(steady, setting_of(steady, name))]
        for name in _SHOWN
    ]
    steps = [f"step {row['step']}" for row in steady.results[0].evals if "churn" in row]
    return Chapter(
        slug="stability",
        title="Stability",
        claim="Under φ-balancing the Gini coefficient of the load falls to 0.002, fifty times "
        "below that of an auxiliary loss (paper, Fig. 3: E = 64, 10 000 steps).",
        verdict=verdict,
        because="Gini of the load at the end, mixed text: "
        + ", ".join(f"{display_name(name)} {value:.3f}" for name, value in gini.items())
        + ". (Rule: *holds* if φ alone has the lowest of the single methods, *in part* if it "
        "halves that of no balancing.) Runs here have 400 steps, not 10 000.",
        body="\n\n".join(
            [
                "### Churn",
                "Share of held-out tokens whose set of experts changed since the evaluation 100 "
                "steps earlier, mixed text:",
                table(["Method", *steps], churn),
                "### A change of text",
                "Half-way the text changes from code and prose to tables and names. "
                "MaxVio of training batches (means over a fortieth of a run): before the change, "
                "at its peak within 200 steps after it, and at the end; the steps until it is back "
                "within a quarter of the value before (– if never). Churn is that of the last 100 "
                "steps.",
                table(
                    ["Method", "Before", "Peak", "At the end", "Steps to recover", "Churn"], rows
                ),
            ]
        ),
        figures={
            "curves": (_steady(steady), "Training batches, mixed text, mean over seeds."),
            "shift": (_shift(shifted), "The text changes half-way; mean over seeds."),
        },
    )


def recovery(run: Result) -> dict[str, float | None]:
    """MaxVio before, at the peak and at the end of a run whose text changes half-way.

    `recovery` is how many steps after the change it is back within a quarter of what it was
    before, None if it never is. A window's step is where it ends.
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


def _mean(study: Study, setting: str, key: str) -> float | None:
    values = [recovery(run)[key] for run in study.select(setting)]
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def _words(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _churn(study: Study, setting: str) -> list[str]:
    runs = study.select(setting)
    columns = zip(*([e["churn"] for e in run.evals if "churn" in e] for run in runs), strict=True)
    return [f"{statistics.fmean(values):.2f}" for values in columns]


def _steady(study: Study) -> Any:
    figure, axes = panels(2)
    for ax, (key, title) in zip(axes, (("gini", "Gini"), ("maxvio", "MaxVio")), strict=True):
        for name in _SHOWN:
            ax.plot(*mean_curve(study, setting_of(study, name), key), **_line(name))
        titles(ax, title, "step", f"{title} of a training batch")
    legend_below(figure, axes[0], columns=5)
    return figure


def _shift(study: Study) -> Any:
    figure, axes = panels(1, height=3.2)
    for setting in study.settings():
        name = family(setting)
        if name in _SHOWN:
            axes[0].plot(*mean_curve(study, setting, "maxvio"), **_line(name))
    half = study.results[0].curve["step"][-1] / 2
    axes[0].axvline(half, color="#5c6570", linewidth=1, linestyle=":")
    logarithmic(axes[0], y=True)
    titles(axes[0], f"A change of text at step {half:.0f}", "step", "MaxVio of a training batch")
    legend_below(figure, axes[0], columns=5)
    return figure


def _line(name: str) -> dict[str, Any]:
    return {"color": look(name)["color"], "label": display_name(name)}
