"""Claim 1: a potential of a batch is biased, a potential of a moving average is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evidence.chapter import Finding, Verdict, claim, table, text
from evidence.figures import Panel, Series, draw
from evidence.study import Studies
from moebalance.report.canvas import CYCLE

_RATE = 0.1
_LINES = (
    ("mixed", None, {"color": CYCLE[3], "linestyle": "--"}),
    ("one-domain", None, {"color": CYCLE[1], "linestyle": "--"}),
    ("mixed", _RATE, {"color": CYCLE[4]}),
    ("one-domain", _RATE, {"color": CYCLE[0]}),
)
Rows = Sequence[Mapping[str, Any]]


@claim(
    slug="population",
    title="Population balance",
    text="The potential of a mini-batch's load is a biased estimate of the population's: "
    "E[φ(p̂)] ≥ φ(E[p]). The potential of a moving average is not biased (paper, §3).",
    rule="*holds* if the excess of the average is less than a third of the excess of the batch, "
    "in one-domain batches, both in the simulation and for the trained router.",
    needs=("population",),
)
def chapter(studies: Studies) -> Finding:
    """From the rows of `population.plug_in_bias`."""
    about = studies["population"].about
    sources: dict[str, Rows] = {name: about[name] for name in ("simulated", "trained")}
    largest = max(row["size"] for row in sources["trained"])
    alone, averaged = (
        {name: _excess(rows, "one-domain", largest, rate) for name, rows in sources.items()}
        for rate in (None, _RATE)
    )
    factor = {name: alone[name] / averaged[name] for name in sources}
    mixed = _excess(sources["trained"], "mixed", largest, None)
    return Finding(
        Verdict.HOLDS if min(factor.values()) > 3 else Verdict.NOT_HERE,
        f"Take batches of {largest} sequences of one domain and a trained router. φ of the batch "
        f"exceeds φ of the population by {alone['trained']:.3f} nats. φ of its moving average at "
        f"rate {_RATE} exceeds it by {averaged['trained']:.3f}, {factor['trained']:.0f} times "
        "less. The average is less biased, not unbiased: the rest shrinks with the rate.",
        noise="Each number is a mean over 2000 draws. There is one trained router.",
        body=text(
            "The table shows the excess E[φ(l̂)] − φ(E[l]) in nats, for negative entropy. The "
            "simulation has eight domains. Each has an expert of its own, and the population is "
            "exactly uniform. The trained router comes from a run with φ-balancing "
            "(`evidence/recipes/population.toml`): mean over its layers, on 2048 sequences.",
            _table(sources, (1, 8, largest)),
            f"In mixed batches the bias falls as 1/n, to {mixed:.4f} at n = {largest}. So φ of a "
            "batch is harmless when the batch is large *and* mixed. In one-domain batches no batch "
            "size helps. Memory helps, and so does sharing the load over many batches.",
        ),
        figures={"bias": (_figure(sources), "Bias of φ of a batch, and of its moving average.")},
    )


def _excess(rows: Rows, sampling: str, size: int, rate: float | None) -> float:
    wanted = (sampling, size, rate)
    found = (r["excess"] for r in rows if (r["sampling"], r["size"], r["rate"]) == wanted)
    return float(next(found))


def _table(sources: Mapping[str, Rows], sizes: Sequence[int]) -> str:
    columns = [(size, rate) for rate in (None, _RATE) for size in sizes]
    rows = [
        [f"{name}, {sampling}", *(f"{_excess(found, sampling, *each):.4f}" for each in columns)]
        for name, found in sources.items()
        for sampling in ("mixed", "one-domain")
    ]
    words = {None: "batch of", _RATE: "average of batches of"}
    return table(["Scores, batches", *(f"{words[rate]} {n}" for n, rate in columns)], rows)


def _figure(sources: Mapping[str, Rows]) -> Any:
    shown = []
    for name, rows in sources.items():
        series = []
        for sampling, rate, style in _LINES:
            points = [r for r in rows if (r["sampling"], r["rate"]) == (sampling, rate)]
            label = f"{sampling}, {'batch alone' if rate is None else f'average, rate {rate}'}"
            x, y = [p["size"] for p in points], [p["excess"] for p in points]
            series.append(Series(label, x, y, style))
        axes = ("sequences in a batch", "excess φ, nats")
        shown.append(Panel(f"{name} router".capitalize(), *axes, series, log="y"))
    figure = draw(shown, columns=2)
    for ax in figure.axes:
        ax.set_xscale("log", base=2)
    return figure
