"""What the rules of `moebalance doctor` find in a section's runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moebalance.report.diagnosis import Finding, Severity, examine
from moebalance.report.estimates import MethodSummary

_OK = Severity.OK


@dataclass(frozen=True)
class Remark:
    """A finding in a run of one method.

    Attributes:
        method: whose run.
        finding: of the run in which the rule found worst.
        where: in how many of the method's runs the rule found something, and which run this is.
    """

    method: MethodSummary
    finding: Finding
    where: str


def remarks(methods: Sequence[MethodSummary]) -> tuple[Remark, ...]:
    """Examine a section's runs, each beside the others.

    Returns:
        The worst first; those of one severity in the order of the methods.
    """
    examined = iter(examine([run for method in methods for run in method.runs]))
    found = []
    for method in methods:
        of_runs = [next(examined) for _ in method.runs]
        rules = dict.fromkeys(f.rule for _, findings in of_runs for f in findings)
        for rule in rules:
            alike = [
                (run, same)
                for run, findings in of_runs
                if (same := [f for f in findings if f.rule == rule and f.severity is not _OK])
            ]
            if alike:
                run, worst = min(alike, key=lambda pair: pair[1][0].severity.rank)
                where = _where(len(alike), len(of_runs), run.seed)
                found += [Remark(method, finding, where) for finding in worst]
    return tuple(sorted(found, key=lambda remark: remark.finding.severity.rank))


def counted(found: Sequence[Remark]) -> str:
    """`1 error, 2 warnings`."""
    names = [remark.finding.severity.value for remark in found]
    return ", ".join(
        f"{names.count(name)} {name}{'' if names.count(name) == 1 else 's'}"
        for name in dict.fromkeys(names)
    )


def _where(count: int, runs: int, seed: int | None) -> str:
    if runs == 1:
        return ""
    return f"in {count} of {runs} runs" + ("" if seed is None else f", here seed {seed}")
