"""Claim 6: experts specialise more under φ-balancing than under an auxiliary loss."""

from __future__ import annotations

from typing import Any

from evidence.chapter import Finding, Verdict, claim, differences, noise, settings_table, sign, text
from evidence.chapters.rivals import RECOMMENDED, TEXTS, pairs
from evidence.figures import Panel, draw, points
from evidence.study import Studies

_METRICS = ("mi", "purity", "top_pair_lift", "router_similarity")
_SHOWN = ("none", "switch", "global-batch", "loss-free", "smebu", "phi", RECOMMENDED)


@claim(
    slug="specialisation",
    title="Specialisation",
    text="Under φ-balancing experts specialise in domains; under an auxiliary loss their domain "
    "mix is nearly flat (paper, Fig. 5).",
    rule="*holds* if φ is above the Switch loss beyond seed noise in every study, *in part* if in "
    "some.",
    needs=tuple(TEXTS),
)
def chapter(studies: Studies) -> Finding:
    """From the runs against the rivals."""
    each = [studies[name] for name in TEXTS]
    signs = [sign(s.less(s.setting("phi"), s.setting("switch"), "mi")) for s in each]
    verdict = Verdict.IN_PART if 1 in signs else Verdict.NOT_HERE
    return Finding(
        Verdict.HOLDS if set(signs) == {1} else verdict,
        "The mutual information between domain and expert (domain MI, nats) is higher under φ than "
        f"under the Switch loss in {signs.count(1)} of {len(signs)} studies, beyond seed noise.",
        noise=noise({words: studies[name] for name, words in TEXTS.items()}, "mi"),
        body=text(
            differences(pairs(studies), ["mi"], head="φ − rival, 95 % interval"),
            "*Purity* is the fraction of an expert's tokens that come from its main domain: 0.25 "
            "without specialisation for four equal domains. *Lift of top pairs* "
            "says how much more often than by chance the most frequent twentieth of expert pairs "
            "serve one token. *Router similarity* is the mean |cosine| of two rows of the router's "
            "weight; random rows of width 64 have 0.10.",
            *(
                f"### Micro-batches: {words}\n\n{settings_table(studies[name], _METRICS)}"
                for name, words in TEXTS.items()
            ),
        ),
        figures={"mi": (_figure(studies), "Specialisation against balance, mean ± sd over seeds.")},
    )


def _figure(studies: Studies) -> Any:
    shown = []
    for name, words in TEXTS.items():
        study = studies[name]
        marks = points(study, study.of(_SHOWN), "maxvio", "mi", label=study.title)
        shown.append(Panel(words, "MaxVio, log scale", "domain MI, nats", marks, log="x"))
    return draw(shown, columns=6, height=3.4, width=9.4)
