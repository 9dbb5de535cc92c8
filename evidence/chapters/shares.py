"""Chapter 11, beyond the paper: loads in given proportions, and balance of groups of experts."""

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
from evidence.chapters.rivals import setting_of
from evidence.figures import legend_below, logarithmic, look, panels, point, titles
from evidence.results import Study

AIMED = "phi(proportions='8x4, 24x1')"
LEVELS = (
    "phi(potential=[{'name': 'NegativeEntropy', 'groups': 4}, "
    "{'name': 'NegativeEntropy', 'weight': 0.1}], load='hard')"
)
PLAIN = "phi(load='hard')"
_SHARES = (
    ("loss", 3, "Validation loss"),
    ("aim_gap", 3, "Distance from the shares"),
    ("aim_maxvio", 2, "MaxVio over the shares"),
    ("maxvio", 2, "MaxVio"),
    ("mi", 3, "Domain MI"),
)
_GROUPS = (
    ("loss", 3, "Validation loss"),
    ("group_maxvio", 3, "MaxVio of devices"),
    ("maxvio", 2, "MaxVio of experts"),
    ("mi", 3, "Domain MI"),
)


def chapter(studies: Studies) -> Chapter:
    """From the study of shares and the study of groups."""
    shares, groups = studies["shares"], studies["groups"]
    aimed, blind = setting_of(shares, AIMED), setting_of(shares, "phi")
    nearer = difference(shares, aimed, blind, "aim_gap")
    levels, plain = setting_of(groups, LEVELS), setting_of(groups, PLAIN)
    devices = difference(groups, levels, plain, "group_maxvio")
    freer = difference(groups, levels, plain, "mi")
    met = nearer is not None and nearer.sign == -1
    free = devices is not None and freer is not None and devices.sign != 1 and freer.sign == 1
    verdict = (
        Verdict.HOLDS if met and free else Verdict.IN_PART if met or free else Verdict.NOT_HERE
    )
    return Chapter(
        slug="shares",
        title="Unequal loads and groups",
        claim="Our own claim: relative to shares φ-balancing brings unequal loads about, and "
        "balanced strongly between devices but weakly within them, experts specialise more while "
        "devices are as even.",
        verdict=verdict,
        because="Distance of the hard load from shares that are four times larger for 8 of 32 "
        f"experts, φ relative to them − plain φ: {in_words(nearer)}. Levels − plain φ of the hard "
        f"load, one-domain micro-batches: MaxVio of the four devices {in_words(devices)}, domain "
        f"MI {in_words(freer)}. (Rule: the first part holds if φ is nearer to the shares beyond "
        "seed noise; the second if devices are not less even and MI is higher beyond seed noise; "
        "*in part* if one of them does.)",
        body="\n\n".join(
            [
                "Distance: half the sum of |load − share|, the part of the assignments that would "
                "have to move. A device holds 8 neighbouring experts. "
                f"{len(shares.seeds())} seeds.",
                _table(shares, _SHARES, "Shares, mixed micro-batches"),
                _table(groups, _GROUPS, "Groups, one-domain micro-batches"),
            ]
        ),
        figures={
            "loads": (
                _figure(shares, groups),
                "Left: loss against the distance from the shares; filled marks know them. Right: "
                "specialisation against the balance of devices; filled marks balance by groups.",
            )
        },
    )


def _table(study: Study, metrics: tuple[tuple[str, int, str], ...], title: str) -> str:
    rows = [
        [f"`{setting}`", *(estimate(study, setting, m, d) for m, d, _ in metrics)]
        for setting in study.settings()
    ]
    heads = ["Method", *(head for _, _, head in metrics)]
    return f"### {title}\n\n{table(heads, rows)}"


def _figure(shares: Study, groups: Study) -> Any:
    figure, axes = panels(2, height=3.4)
    sides = (
        (shares, "aim_gap", "loss", "proportions="),
        (groups, "group_maxvio", "mi", "groups"),
    )
    for ax, (study, x, y, knows) in zip(axes, sides, strict=True):
        for setting in study.settings():
            fill = {} if knows in setting else {"markerfacecolor": "white"}
            method = study.select(setting)[0].method
            point(ax, study, setting, x, y, label=_short(setting), **look(method), **fill)
        logarithmic(ax, x=True)
    titles(axes[0], "Shares, mixed text", "distance from the shares", "validation loss, nats/byte")
    titles(axes[1], "Groups, one domain a batch", "MaxVio of devices", "domain MI, nats")
    legend_below(figure, axes[0], columns=3)
    return figure


def _short(setting: str) -> str:
    """A setting as a legend has room for it."""
    word = setting.partition("(")[0]
    both = word + ("+loss-free" if "+loss-free" in setting else "")
    return both + (" to shares" if "proportions=" in setting else "")
