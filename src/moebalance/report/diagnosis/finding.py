"""What a rule says: how bad, where, what, from which numbers, and what to change."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Finding:
    """One thing found in a run.

    Attributes:
        rule: name of the rule, the same in every version.
        severity: how bad.
        what: what is wrong, in a sentence.
        because: the numbers behind it.
        do: what to change; empty where there is nothing to do.
        layers: which of the run's layers, by their place; empty for all of them.
    """

    rule: str
    severity: Severity
    what: str
    because: str
    do: str = ""
    layers: tuple[int, ...] = ()
