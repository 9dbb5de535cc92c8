"""Chapter 11, beyond the paper: loads in given proportions, and balance of groups of experts."""

from __future__ import annotations

from typing import Any

from evidence.chapter import Finding, Verdict, change, claim, noise, settings_table, sign, text
from evidence.figures import Panel, draw, points
from evidence.study import Studies, Study

AIMED = "phi(proportions='8x4, 24x1')"
LEVELS = (
    "phi(potential=[{'name': 'NegativeEntropy', 'groups': 4}, "
    "{'name': 'NegativeEntropy', 'weight': 0.1}], load='hard')"
)
PLAIN = "phi(load='hard')"
_PROPORTIONS = ("loss", "aim_gap", "aim_maxvio", "maxvio", "mi")
_GROUPS = ("loss", "group_maxvio", "maxvio", "mi")


@claim(
    slug="proportions",
    title="Unequal loads and groups",
    text="Our own claim: relative to given proportions φ-balancing brings unequal loads about. "
    "Balanced strongly between devices and weakly within them, experts specialise more while "
    "devices are as even.",
    rule="the first part holds if φ is nearer to the proportions beyond seed noise; the second if "
    "devices are not less even and domain MI is higher beyond seed noise; *in part* if one of them "
    "does.",
    needs=("proportions", "groups"),
)
def chapter(studies: Studies) -> Finding:
    """From the study of proportions and the study of groups."""
    unequal, groups = studies["proportions"], studies["groups"]
    aimed, blind = unequal.setting(AIMED), unequal.setting("phi")
    levels, plain = groups.setting(LEVELS), groups.setting(PLAIN)
    met = sign(unequal.less(aimed, blind, "aim_gap")) == -1
    even = sign(groups.less(levels, plain, "group_maxvio")) in (-1, 0)
    free = even and sign(groups.less(levels, plain, "mi")) == 1
    return Finding(
        {0: Verdict.NOT_HERE, 1: Verdict.IN_PART, 2: Verdict.HOLDS}[met + free],
        "The first part compares φ relative to the proportions with plain φ. The distance of the "
        f"hard load from the proportions changes by {change(unequal, aimed, blind, 'aim_gap')}. "
        "The second part compares two levels of groups with plain φ of the hard load, in "
        "one-domain micro-batches. MaxVio of the four devices changes by "
        f"{change(groups, levels, plain, 'group_maxvio')}, domain MI by "
        f"{change(groups, levels, plain, 'mi')}.",
        noise=noise({"proportions": unequal}, "loss", "aim_gap")
        + " "
        + noise({"groups": groups}, "group_maxvio", "mi"),
        body=text(
            "*Distance* is half the sum of |load − proportion|: the part of the assignments that "
            "would have to move. The proportions give 8 of 32 experts four times the load of the "
            "others. A device holds 8 neighbouring experts.",
            "### Proportions, mixed micro-batches",
            settings_table(unequal, _PROPORTIONS),
            "### Groups, one-domain micro-batches",
            settings_table(groups, _GROUPS),
        ),
        figures={
            "loads": (
                _figure(unequal, groups),
                "Left: loss against the distance from the proportions; filled marks know them. "
                "Right: specialisation against the balance of devices; filled marks balance by "
                "groups.",
            )
        },
    )


def _figure(unequal: Study, groups: Study) -> Any:
    sides = (
        (unequal, "aim_gap", "loss", "proportions="),
        (groups, "group_maxvio", "mi", "groups"),
    )
    left, right = (
        points(study, study.settings(), x, y, label=_short, hollow=_without(study, knows))
        for study, x, y, knows in sides
    )
    away, loss = "distance from the proportions", "validation loss, nats/byte"
    shown = [
        Panel("Proportions, mixed text", away, loss, left, log="x"),
        Panel("Groups, one-domain text", "MaxVio of devices", "domain MI, nats", right, log="x"),
    ]
    return draw(shown, columns=3, height=3.4)


def _without(study: Study, knows: str) -> list[str]:
    return [setting for setting in study.settings() if knows not in setting]


def _short(setting: str) -> str:
    """A setting as a legend has room for it."""
    word = setting.partition("(")[0]
    both = word + ("+loss-free" if "+loss-free" in setting else "")
    return both + (" to proportions" if "proportions=" in setting else "")
