"""What a rule says: how bad, what, what to do, from which numbers, and where."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        """0 for the worst."""
        return (Severity.ERROR, Severity.WARNING, Severity.NOTE, Severity.OK).index(self)


class Wish(StrEnum):
    """What a finding asks of the balancing, for findings that may contradict each other."""

    NOTHING = ""
    MORE = "more pressure"
    LESS = "less pressure"
    OTHER = "another lever"


@dataclass(frozen=True)
class Finding:
    """One thing found in a run or a model.

    Attributes:
        severity: how bad.
        what: what is wrong, in a sentence.
        do: what to change; empty where there is nothing to do.
        because: the numbers behind it; empty where `what` says them.
        rule: name of the rule, the same in every version.
        layers: which of the run's layers, by their place; empty for all of them.
        wish: in which direction `do` turns the balancing.
    """

    severity: Severity
    what: str
    do: str = ""
    because: str = ""
    rule: str = ""
    layers: tuple[int, ...] = ()
    wish: Wish = Wish.NOTHING


def wrapped(head: str, text: str, width: int) -> list[str]:
    """A text in lines, the first behind a head and the others below it."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
