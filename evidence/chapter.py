"""What a chapter says: a claim, a verdict by a written rule, and the evidence beneath it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from evidence.results import Study
from moebalance.report.estimates import Estimate, number
from moebalance.report.verdict import Difference, paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Studies = Mapping[str, Study]
"""Committed results by the name of their recipe."""


class Verdict(Enum):
    """The plain answer to a claim."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    NOT_HERE = "does not hold here"
    UNTESTED = "cannot be tested at this size"
    OPEN = "not run yet"


@dataclass(frozen=True)
class Chapter:
    """One claim and what was found.

    Attributes:
        slug: name of its figures' files.
        title: a few words.
        claim: what is claimed, in a sentence, with who claims it.
        verdict: the answer, by the rule that `because` states.
        because: the numbers behind the answer, in one or two sentences.
        body: Markdown: tables, what was done, what else is seen.
        figures: by name; drawn to docs/evidence/<slug>-<name>.svg, with the text under them.
    """

    slug: str
    title: str
    claim: str
    verdict: Verdict
    because: str
    body: str
    figures: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)


def not_run(slug: str, title: str, claim: str, names: Sequence[str]) -> Chapter:
    """A claim whose recipes are there and whose results are not."""
    recipes = " and ".join(f"`evidence/recipes/{name}.toml`" for name in names)
    words = f"{recipes} can be run; no results of them are committed."
    return Chapter(slug, title, claim, Verdict.OPEN, words, "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is words, the others numbers."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *rows))


def estimate(
    study: Study, setting: str, metric: str, digits: int, *, batching: str | None = None
) -> str:
    """Mean ± sd over seeds, or a dash."""
    found = Estimate.of(study.by_seed(setting, metric, batching=batching).values())
    return "–" if found is None else found.text(digits)


def difference(
    study: Study, ours: str, theirs: str, metric: str, *, batching: str | None = None
) -> Difference | None:
    """Paired difference of two settings over the seeds that both have."""
    return paired(
        study.by_seed(ours, metric, batching=batching),
        study.by_seed(theirs, metric, batching=batching),
    )


def in_words(found: Difference | None, digits: int = 3) -> str:
    """A difference with its 95 % interval: `−0.012 (−0.020 to −0.004)`."""
    if found is None:
        return "–"
    if found.half is None:
        return f"{number(found.mean, digits)} (one seed)"
    low, high = found.mean - found.half, found.mean + found.half
    return f"{number(found.mean, digits)} ({number(low, digits)} to {number(high, digits)})"
