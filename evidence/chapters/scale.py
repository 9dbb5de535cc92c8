"""Claim 8: the advantage grows with the model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from evidence.chapter import (
    Chapter,
    Studies,
    Verdict,
    difference,
    estimate,
    in_words,
    table,
)
from evidence.chapters.rivals import setting_of
from evidence.figures import legend_below, logarithmic, look, panels, titles
from evidence.results import Study
from moebalance.report.methods import display_name

SIZES = ("scale_tiny", "scale_small", "scale_medium")
LARGER = ("scale_large", "scale_gpu")
_METHODS = ("switch", "loss-free", "phi", "phi+loss-free")


def chapter(studies: Studies) -> Chapter:
    """From three sizes on a CPU, and from larger ones where their results are committed."""
    ladder = [studies[name] for name in (*SIZES, *LARGER) if name in studies]
    gaps = [difference(s, setting_of(s, "phi"), setting_of(s, "switch"), "loss") for s in ladder]
    known = [gap for gap in gaps if gap is not None]
    falling = all(b.mean < a.mean for a, b in pairwise(known))
    verdict = Verdict.UNTESTED
    if falling and known[-1].sign == -1:
        verdict = Verdict.IN_PART
    sizes = [f"{parameters(s) / 1e3:,.0f}k" for s in ladder]
    rows = []
    for name in ("none", *_METHODS):
        row = [display_name(name)]
        for s in ladder:
            setting = setting_of(s, name)
            loss = difference(s, setting, "none", "loss")
            first = estimate(s, setting, "loss", 3) if name == "none" else in_words(loss)
            row += [first, estimate(s, setting, "maxvio", 2)]
        rows.append(row)
    heads = [head for size in sizes for head in (f"{size}: loss − none", f"{size}: MaxVio")]
    said = "; ".join(
        f"{size} parameters {in_words(gap)}" for size, gap in zip(sizes, gaps, strict=True)
    )
    missing = [f"`evidence/recipes/{name}.toml`" for name in LARGER if name not in studies]
    larger = f" Larger rungs are ready to run: {' and '.join(missing)}." if missing else ""
    return Chapter(
        slug="scale",
        title="Scale",
        claim="The gap in validation loss to the auxiliary loss grows with size, from 0.005 nats "
        "at 111M active parameters to 0.065 at 986M (paper, Fig. 2).",
        verdict=verdict,
        because=f"Loss, φ − Switch: {said}. At a thousandth of the paper's sizes no gap is to be "
        "expected, and a trend over so few sizes is no law. (Rule: *in part* if the gap falls from "
        "size to size and is below zero beyond seed noise at the largest; else untested.)" + larger,
        body="\n\n".join(
            [
                "Loss relative to no balancing with its 95 % interval (first row: the loss "
                f"itself), {len(ladder[0].seeds())} seeds, mixed text; tokens grow with the model.",
                table(["Method", *heads], rows),
            ]
        ),
        figures={"ladder": (_figure(ladder), "Loss relative to no balancing, mean over seeds.")},
    )


def parameters(study: Study) -> int:
    """Active parameters of a study's model."""
    return int(study.about["model"]["active_parameters"])


def _figure(ladder: list[Study]) -> Any:
    figure, axes = panels(2)
    x = [parameters(study) for study in ladder]
    for name in _METHODS:
        gaps = [difference(s, setting_of(s, name), "none", "loss") for s in ladder]
        balance = [s.mean(setting_of(s, name), "maxvio") for s in ladder]
        label = display_name(name)
        axes[0].plot(x, [g.mean if g else float("nan") for g in gaps], label=label, **look(name))
        axes[1].plot(x, balance, label=label, **look(name))
    axes[0].axhline(0, color="#5c6570", linewidth=1)
    titles(axes[0], "Loss", "active parameters", "loss − loss without balancing")
    titles(axes[1], "Balance", "active parameters", "MaxVio")
    for ax in axes:
        logarithmic(ax, x=True)
    legend_below(figure, axes[0])
    return figure
