"""What a chapter consists of: a claim with the rule of its verdict, and what was found.

A chapter is a function from studies to a `Finding`, marked with `@claim`. The rule was written
before the runs that it judges.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from evidence.study import METRICS, Studies, Study
from moebalance.report.estimates import number
from moebalance.report.verdict import Difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Verdict(Enum):
    """The plain answer to a claim."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    NOT_HERE = "does not hold here"
    UNTESTED = "cannot be tested at this size"
    OPEN = "not run yet"


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        verdict: the answer, by the rule of the claim.
        because: the numbers behind the answer, in one or two sentences.
        noise: how far single runs differ by their seed alone.
        body: Markdown: what was done, tables, what else is seen.
        figures: by name; drawn to docs/evidence/<slug>-<name>.svg, with the text under them.
    """

    verdict: Verdict
    because: str
    noise: str = ""
    body: str = ""
    figures: Mapping[str, tuple[Figure, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A chapter.

    Attributes:
        slug: begins the names of its figures.
        title: a few words.
        text: what is claimed, and who claims it.
        rule: how the verdict follows from the numbers.
        needs: the studies without which the claim cannot be judged.
        find: judges it.
    """

    slug: str
    title: str
    text: str
    rule: str
    needs: tuple[str, ...]
    find: Callable[[Studies], Finding]

    def __call__(self, studies: Studies) -> Finding:
        """What was found; that nothing was run if a study is missing."""
        if all(name in studies for name in self.needs):
            return self.find(studies)
        recipes = " and ".join(f"`evidence/recipes/{name}.toml`" for name in self.needs)
        return Finding(Verdict.OPEN, f"{recipes} can be run; their results are not committed.")


def claim(**about: Any) -> Callable[[Callable[[Studies], Finding]], Claim]:
    """Make a claim of the function that judges it; arguments as the attributes of `Claim`."""
    return lambda find: Claim(**about, find=find)


def text(*parts: str) -> str:
    """Paragraphs, without the empty ones."""
    return "\n\n".join(part for part in parts if part)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is words, the others numbers."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *rows))


def cells(study: Study, setting: str, metrics: Iterable[str]) -> list[str]:
    """Mean ± sd over seeds of each metric, or a dash."""
    found = [(study.estimate(setting, metric), METRICS[metric][1]) for metric in metrics]
    return ["–" if each is None else each.text(digits) for each, digits in found]


def heads(metrics: Iterable[str]) -> list[str]:
    """Titles of metrics."""
    return [METRICS[metric][0] for metric in metrics]


def settings_table(
    study: Study,
    metrics: Sequence[str],
    settings: Mapping[str, str] | Iterable[str] | None = None,
    *,
    head: str = "Method",
) -> str:
    """Setting → estimate → row.

    Args:
        study: whose last evaluations are shown.
        metrics: a column each.
        settings: a row each, with words to show if it is a mapping; all of them by default.
        head: over the first column.
    """
    shown = study.settings() if settings is None else settings
    words = shown if isinstance(shown, Mapping) else {setting: f"`{setting}`" for setting in shown}
    rows = [[word, *cells(study, setting, metrics)] for setting, word in words.items()]
    return table([head, *heads(metrics)], rows)


def change(study: Study, ours: str, theirs: str, metric: str) -> str:
    """Ours less theirs in words, with its 95 % interval."""
    return in_words(study.less(ours, theirs, metric), METRICS[metric][1])


def in_words(found: Difference | None, digits: int = 3) -> str:
    """A difference with its 95 % interval: `−0.012 (−0.020 to −0.004)`."""
    if found is None:
        return "–"
    if found.half is None:
        return f"{number(found.mean, digits)} (one seed)"
    low, high = found.mean - found.half, found.mean + found.half
    return f"{number(found.mean, digits)} ({number(low, digits)} to {number(high, digits)})"


def sign(found: Difference | None) -> int | None:
    """−1 lower, 1 higher, 0 within seed noise, None if that is unknown."""
    return None if found is None else found.sign


def differences(
    rows: Iterable[tuple[str, Study, str, str]], metrics: Sequence[str], *, head: str
) -> str:
    """Words, study, ours and theirs → row: ours less theirs, with 95 % intervals."""
    found = [
        [words, *(change(study, ours, theirs, metric) for metric in metrics)]
        for words, study, ours, theirs in rows
    ]
    return table([head, *heads(metrics)], found)


def noise(studies: Mapping[str, Study], *metrics: str) -> str:
    """The standard deviation of a run over seeds, root mean square over settings."""
    said = [
        f"{words} ({len(study.seeds())} seeds) "
        + ", ".join(f"{METRICS[m][0]} {number(sd(study, m), METRICS[m][1])}" for m in metrics)
        for words, study in studies.items()
    ]
    return f"Standard deviation of one run: {'; '.join(said)}."


def sd(study: Study, metric: str) -> float:
    """The standard deviation of a run over seeds, root mean square over settings."""
    found = [study.estimate(setting, metric) for setting in study.settings()]
    squares = [each.sd**2 for each in found if each is not None and each.sd is not None]
    return math.sqrt(statistics.fmean(squares)) if squares else math.nan
