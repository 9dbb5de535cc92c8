"""Claim 6: experts specialise more under φ-balancing than under an auxiliary loss."""

from __future__ import annotations

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
from evidence.chapters.rivals import ran, setting_of, there
from evidence.figures import legend_below, logarithmic, look, panels, point, titles
from moebalance.report.methods import display_name

_METRICS = (("mi", 3), ("purity", 3), ("top_pair_lift", 1), ("router_similarity", 3))
_HEADS = ("Domain MI", "Purity", "Lift of top pairs", "Router similarity")
_SHOWN = ("none", "switch", "global-batch", "loss-free", "phi", "phi+loss-free")


def chapter(studies: Studies) -> Chapter:
    """From the runs against the rivals."""
    signs, words = [], []
    for name, batching in there(studies).items():
        study = studies[name]
        phi = setting_of(study, "phi")
        for rival in ("switch", "loss-free"):
            found = difference(study, phi, setting_of(study, rival), "mi")
            signs.append((rival, found.sign if found else None))
            words.append(f"{batching}, φ − {display_name(rival)}: {in_words(found)}")
    against_switch = [sign for rival, sign in signs if rival == "switch"]
    verdict = Verdict.NOT_HERE
    if 1 in against_switch:
        verdict = Verdict.HOLDS if all(s == 1 for s in against_switch) else Verdict.IN_PART
    parts = []
    for name, batching in there(studies).items():
        study = studies[name]
        rows = [
            [f"`{setting}`", *(estimate(study, setting, m, d) for m, d in _METRICS)]
            for setting in study.settings()
        ]
        parts += [f"### Micro-batches: {batching}", table(["Method", *_HEADS], rows)]
    return Chapter(
        slug="specialisation",
        title="Specialisation",
        claim="Under φ-balancing experts specialise in domains; under an auxiliary loss their "
        "domain mix is nearly flat (paper, Fig. 5).",
        verdict=verdict,
        because="Mutual information between domain and expert, nats: "
        + "; ".join(words)
        + ". (Rule: *holds* if φ is above the Switch loss beyond seed noise in all of them, "
        "*in part* if in some.)",
        body="\n\n".join(
            [
                "Purity is the share of an expert's tokens that come from its main domain (0.25 is "
                "none, for four equal domains, and 0.14 for seven). Lift of top pairs: how much "
                "more often than chance the most frequent twentieth of expert pairs serve one "
                "token. Router similarity: mean |cosine| of two rows of the router's weight "
                "(random rows of width 64 show 0.10).",
                *parts,
            ]
        ),
        figures={"mi": (_figure(studies), "Specialisation against balance, mean ± sd.")},
    )


def _figure(studies: Studies) -> Any:
    figure, axes = panels(len(there(studies)), height=3.4, width=9.4)
    for ax, (name, batching) in zip(axes, there(studies).items(), strict=True):
        study = studies[name]
        for wanted in ran(study, _SHOWN):
            setting = setting_of(study, wanted)
            method = study.select(setting)[0].method
            point(ax, study, setting, "maxvio", "mi", label=display_name(method), **look(method))
        logarithmic(ax, x=True)
        titles(ax, batching, "MaxVio, log scale", "domain MI, nats")
    legend_below(figure, axes[0], columns=6)
    return figure
