"""Claim 8: the advantage grows with the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from evidence.chapter import Finding, Verdict, cells, change, claim, noise, sign, table, text
from evidence.chapters.rivals import RECOMMENDED
from evidence.figures import GUIDE, Panel, Series, draw
from evidence.study import Studies, Study
from moebalance.report.canvas import look
from moebalance.report.methods import display_name

SIZES = ("rivals",)
LARGER = ("scale_large", "scale_gpu")
_METHODS = ("switch", "loss-free", "phi", RECOMMENDED)


@claim(
    slug="scale",
    title="Scale",
    text="The gap in validation loss to the auxiliary loss grows with size, from 0.005 nats at "
    "111M active parameters to 0.065 at 986M (paper, Fig. 2).",
    rule="*in part* if the gap falls from size to size and is below zero beyond seed noise at the "
    "largest; else untested.",
    needs=SIZES,
)
def chapter(studies: Studies) -> Finding:
    """From the rivals' size, and from larger ones where their results are committed."""
    ladder = [studies[name] for name in (*SIZES, *LARGER) if name in studies]
    gaps = [s.less(s.setting("phi"), s.setting("switch"), "loss") for s in ladder]
    known = [gap for gap in gaps if gap is not None]
    falling = all(b.mean < a.mean for a, b in pairwise(known))
    trend = len(known) > 1 and falling and sign(known[-1]) == -1
    verdict = Verdict.IN_PART if trend else Verdict.UNTESTED
    said = "; ".join(
        f"{_size(s)} parameters {change(s, s.setting('phi'), s.setting('switch'), 'loss')}"
        for s in ladder
    )
    missing = [f"`evidence/recipes/{name}.toml`" for name in LARGER if name not in studies]
    larger = f" Larger sizes are ready to run: {' and '.join(missing)}." if missing else ""
    return Finding(
        verdict,
        f"Loss, φ − Switch: {said}. This is a thousandth of the paper's size, where no gap is to "
        f"be expected.{larger}",
        noise=noise({_size(study): study for study in ladder}, "loss", "maxvio"),
        body=text(
            "Loss less the loss without balancing, with its 95 % interval, mixed text. The first "
            "row has the loss without balancing itself. Every run has 2000 steps of 1024 bytes.",
            _table(ladder),
        ),
        figures={"ladder": (_figure(ladder), "Loss relative to no balancing, mean over seeds.")},
    )


def parameters(study: Study) -> int:
    """Active parameters of a study's model."""
    return int(study.about["model"]["active_parameters"])


def _size(study: Study) -> str:
    return f"{parameters(study) / 1e3:,.0f}k"


def _table(ladder: Sequence[Study]) -> str:
    rows = []
    for name in ("none", *_METHODS):
        row = [display_name(name)]
        for s in ladder:
            loss, maxvio = cells(s, s.setting(name), ("loss", "maxvio"))
            row += [loss if name == "none" else change(s, s.setting(name), "none", "loss"), maxvio]
        rows.append(row)
    heads = [f"{_size(s)}: {what}" for s in ladder for what in ("loss − none", "MaxVio")]
    return table(["Method", *heads], rows)


def _figure(ladder: Sequence[Study]) -> Any:
    x = [parameters(study) for study in ladder]
    loss, balance = [], []
    for name in _METHODS:
        gaps = [s.less(s.setting(name), "none", "loss") for s in ladder]
        y = [gap.mean if gap else float("nan") for gap in gaps]
        loss.append(Series(display_name(name), x, y, look(name)))
        y = [s.mean(s.setting(name), "maxvio") for s in ladder]
        balance.append(Series(None, x, y, look(name)))
    axes = "active parameters"
    shown = [
        Panel("Loss", axes, "loss − loss without balancing", loss, log="x"),
        Panel("Balance", axes, "MaxVio", balance, log="x"),
    ]
    figure = draw(shown)
    figure.axes[0].axhline(0, color=GUIDE, linewidth=1)
    return figure
