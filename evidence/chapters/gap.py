"""Chapter 9, beyond the paper: soft load in balance, hard load not; and what closes the gap."""

from __future__ import annotations

from typing import Any

from evidence.chapter import Finding, Verdict, change, claim, noise, settings_table, sign, text
from evidence.chapters.rivals import RECOMMENDED, TEXTS
from evidence.figures import GUIDE, Panel, Series, draw, points
from evidence.study import Studies, Study

_SHOWN = ("none", "phi", "phi(load='hard')", RECOMMENDED, "loss-free", "switch")
_METRICS = ("loss", "soft_maxvio", "maxvio", "soft_hard_gap", "mi")


@claim(
    slug="gap",
    title="The soft–hard gap",
    text="Our own claim: φ-balancing as published balances the mean probability. The load that "
    "top-k delivers, which is what machines feel, lags behind.",
    rule="*holds* if MaxVio of the hard load is more than 2 times MaxVio of the soft load. "
    "Recommended is the setting with φ of lowest mean MaxVio whose loss is not higher than under φ "
    "alone beyond seed noise.",
    needs=tuple(TEXTS),
)
def chapter(studies: Studies) -> Finding:
    """From the runs against the rivals."""
    study = studies["rivals"]
    phi = study.setting("phi")
    hard, soft = (study.mean(phi, metric) for metric in ("maxvio", "soft_maxvio"))
    best = recommended(study)
    said = "No setting tried here lowers MaxVio without a higher loss."
    if best:
        said = (
            f"The recommendation is `{best}`: MaxVio {study.mean(best, 'maxvio'):.2f} instead of "
            f"{hard:.2f}, loss relative to φ alone {change(study, best, phi, 'loss')}."
        )
    return Finding(
        Verdict.HOLDS if hard > 2 * soft else Verdict.NOT_HERE,
        f"Under φ alone MaxVio of the hard load is {hard:.2f}, {hard / soft:.1f} times MaxVio of "
        f"the soft load, {soft:.2f}. {said}",
        noise=noise({"mixed": study}, "loss", "maxvio", "soft_maxvio"),
        body=text(
            *(
                f"### Micro-batches: {words}\n\n"
                + settings_table(studies[name], _METRICS, studies[name].of(_SHOWN))
                for name, words in TEXTS.items()
            )
        ),
        figures={"gap": (_figure(study), "Soft against hard MaxVio; on the line there is no gap.")},
    )


def recommended(study: Study) -> str | None:
    """The setting with φ of lowest MaxVio that costs no loss against φ alone; None if none is."""
    phi = study.setting("phi")
    free = [
        setting
        for setting in study.of(["phi(load='hard')", RECOMMENDED])
        if sign(study.less(setting, phi, "loss")) in (-1, 0)
        and sign(study.less(setting, phi, "maxvio")) == -1
    ]
    return min(free, key=lambda setting: study.mean(setting, "maxvio"), default=None)


def _figure(study: Study) -> Any:
    ends, settings = [0.05, 5], study.of(_SHOWN)
    series = [Series(None, ends, ends, {"color": GUIDE, "linewidth": 1})]
    series += points(study, settings, "soft_maxvio", "maxvio", label=lambda _: None)
    panel = Panel("Soft and hard load, mixed text", "soft MaxVio", "hard MaxVio", series, log="xy")
    figure = draw([panel], height=3.6, width=5.2)
    for setting in settings:
        at = study.mean(setting, "soft_maxvio"), study.mean(setting, "maxvio")
        figure.axes[0].annotate(setting, at, (5, 4), textcoords="offset points", fontsize=6)
    return figure
