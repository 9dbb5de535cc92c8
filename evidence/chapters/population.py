"""Claim 1: a potential of a batch is biased, a potential of a moving average is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence.chapter import Chapter, Studies, Verdict, table
from evidence.figures import CYCLE, legend_below, logarithmic, panels, titles

_RATE = 0.1


def chapter(studies: Studies) -> Chapter:
    """From the rows of `population.plug_in_bias`, for a simulation and for a trained router."""
    rows = studies["population"].about
    sources = {"simulated": rows["simulated"], "trained": rows["trained"]}
    largest = max(row["size"] for row in sources["trained"])

    def excess(source: str, sampling: str, size: int, rate: float | None) -> float:
        return next(
            float(row["excess"])
            for row in sources[source]
            if (row["sampling"], row["size"], row["rate"]) == (sampling, size, rate)
        )

    alone = {s: excess(s, "one-domain", largest, None) for s in sources}
    averaged = {s: excess(s, "one-domain", largest, _RATE) for s in sources}
    mixed = {s: excess(s, "mixed", largest, None) for s in sources}
    factor = {s: alone[s] / averaged[s] for s in sources}
    verdict = Verdict.HOLDS if min(factor.values()) > 3 else Verdict.NOT_HERE
    sizes = (1, 8, largest)
    cells = [
        [
            f"{source}, {sampling}",
            *(f"{excess(source, sampling, size, None):.4f}" for size in sizes),
            *(f"{excess(source, sampling, size, _RATE):.4f}" for size in sizes),
        ]
        for source in sources
        for sampling in ("mixed", "one-domain")
    ]
    heads = [f"batch of {n}" for n in sizes] + [f"average of batches of {n}" for n in sizes]
    return Chapter(
        slug="population",
        title="Population balance",
        claim="The potential of a mini-batch's load is a biased estimate of the population's, "
        "E[φ(p̂)] ≥ φ(E[p]), and a moving average is not (paper, §3).",
        verdict=verdict,
        because=f"On batches of {largest} sequences of one domain, φ of the batch exceeds φ of the "
        f"population by {alone['trained']:.3f} nats for a trained router; φ of its moving average "
        f"at rate {_RATE} exceeds it by {averaged['trained']:.3f}, {factor['trained']:.0f} times "
        f"less. The average is less biased, not unbiased: what is left shrinks with the rate. "
        "(Rule: at least 3 times less in both.)",
        body="\n\n".join(
            [
                "Excess E[φ(l̂)] − φ(E[l]) in nats, negative entropy, 2000 draws a number. The "
                "simulation has eight domains, each with an expert of its own, and a population "
                "that is exactly uniform; the trained router is that of a φ-balanced run "
                "(`evidence/recipes/population.toml`), layer by layer, on 2048 sequences.",
                table(["Scores, batches", *heads], cells),
                f"With mixed batches the bias falls as 1/n, to {mixed['trained']:.4f} at n = "
                f"{largest}: a plug-in is harmless when a batch is large *and* mixed. With batches "
                "of one domain no batch size helps, only memory (or sharing the statistic over "
                "many batches) does.",
            ]
        ),
        figures={"bias": (_figure(sources), "Bias of φ at a batch, and at its moving average.")},
    )


def _figure(sources: Mapping[str, list[dict[str, Any]]]) -> Any:
    figure, axes = panels(2)
    lines = (
        ("mixed", None, CYCLE[3], "--"),
        ("one-domain", None, CYCLE[1], "--"),
        ("mixed", _RATE, CYCLE[4], "-"),
        ("one-domain", _RATE, CYCLE[0], "-"),
    )
    for ax, (source, rows) in zip(axes, sources.items(), strict=True):
        for sampling, rate, colour, style in lines:
            points = [r for r in rows if r["sampling"] == sampling and r["rate"] == rate]
            what = "batch alone" if rate is None else f"average, rate {rate}"
            ax.plot(
                [r["size"] for r in points],
                [r["excess"] for r in points],
                style,
                color=colour,
                label=f"{sampling}, {what}",
            )
        logarithmic(ax, y=True)
        ax.set_xscale("log", base=2)
        titles(ax, f"{source} router".capitalize(), "sequences in a batch", "excess φ, nats")
    legend_below(figure, axes[0], columns=2)
    return figure
