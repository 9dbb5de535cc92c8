"""From the findings in a method's runs to one recommendation, with the evidence for it.

Rules look at one thing each, and may ask for opposite changes: more pressure for an uneven load,
less for a loss that is too high. Here the runs of all seeds are put together, what has the same
cause is said once, and a contradiction becomes one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moebalance.report.diagnosis.finding import Finding, Severity, Wish, wrapped
from moebalance.report.estimates import MethodSummary
from moebalance.report.parts import Part, parts_of
from moebalance.runlog import Run

_CAUSES = (
    *("unfinished", "not-finite", "diverged", "never-acted", "overshoot", "oscillation"),
    *("soft-hard-gap", "price-too-slow", "slow-recovery", "target-out-of-reach", "one-layer"),
    *("uneven", "dead", "drift", "pinned", "costs-loss", "spikes", "too-short", "few-rows"),
)
"""Of findings that are as bad, the cause first: what comes later may be gone once it is mended."""
_MOST = 4
"""Findings that are told in full: a reader acts on the first ones."""


@dataclass(frozen=True)
class Evidence:
    """What one rule found in the runs of a method.

    Attributes:
        finding: of the run in which it is worst, with all layers of that run.
        where: in how many runs, and which one is told; empty for a single run.
    """

    finding: Finding
    where: str


@dataclass(frozen=True)
class Diagnosis:
    """What is to be said about one method, over its seeds.

    Attributes:
        method: which.
        evidence: the findings, the worst first.
        advice: what to change; empty where there is nothing to do.
    """

    method: MethodSummary
    evidence: tuple[Evidence, ...]
    advice: str

    @property
    def severity(self) -> Severity:
        """Of the worst finding."""
        return self.evidence[0].finding.severity if self.evidence else Severity.OK


def reconcile(
    method: MethodSummary, examined: Sequence[tuple[Run, Sequence[Finding]]]
) -> Diagnosis:
    """Put the findings of a method's runs together."""
    by_rule: dict[str, list[tuple[Run, Finding]]] = {}
    for run, findings in examined:
        for rule in dict.fromkeys(finding.rule for finding in findings):
            by_rule.setdefault(rule, []).append(
                (run, _alike([finding for finding in findings if finding.rule == rule]))
            )
    told, shared = [], []
    for found in by_rule.values():
        run, worst = min(found, key=lambda pair: pair[1].severity.rank)
        told.append(Evidence(worst, _where(len(found), len(examined), run.seed)))
        # What a minority of seeds shows does not decide, unless it is an error.
        if 2 * len(found) >= len(examined) or worst.severity is Severity.ERROR:
            shared.append(worst)
    told.sort(key=lambda evidence: _urgency(evidence.finding))
    return Diagnosis(method, tuple(told), _advice(shared or [e.finding for e in told], method))


def counted(found: Sequence[Diagnosis]) -> str:
    """`1 error, 2 warnings`: what the diagnoses say, without what is well."""
    names = [e.finding.severity for diagnosis in found for e in diagnosis.evidence]
    return ", ".join(
        f"{names.count(name)} {name}{'' if names.count(name) == 1 else 's'}"
        for name in sorted(set(names) - {Severity.OK}, key=lambda name: name.rank)
    )


def render(found: Sequence[Diagnosis], *, width: int = 100) -> str:
    """A paragraph for each method, in lines of at most `width` characters where words allow it."""
    return "\n\n".join("\n".join(_paragraph(diagnosis, width)) for diagnosis in found)


def _advice(findings: Sequence[Finding], method: MethodSummary) -> str:
    asking = sorted((f for f in findings if f.do), key=_urgency)
    if not asking:
        return ""
    # Notes and faults of the run itself contradict nobody.
    wishes = {f.wish for f in asking if f.severity.rank <= Severity.WARNING.rank}
    first = asking[0]
    if first.wish and Wish.LESS in wishes and wishes & {Wish.MORE, Wish.OTHER}:
        return _between(method)
    # What a short run shows may pass: it is too early to change the pressure.
    early = [finding for finding in asking if finding.rule == "too-short"]
    if early and first.wish and method.balances is not False:
        return early[0].do
    # A larger strength does not reach what another lever is needed for.
    other = [finding for finding in asking if finding.wish is Wish.OTHER]
    return other[0].do if other and first.wish is Wish.MORE else first.do


def _between(method: MethodSummary) -> str:
    """What to do where more pressure is asked for, and less."""
    parts = parts_of(method.runs[0])
    charging = next((part for part in parts if part.charges and not part.wraps), None)
    selecting = next((part for part in parts if part.selects), None)
    lower = _changed(charging, "strength", 1 / 3)
    if selecting is None and lower:
        return (
            f"Balance by a selection price, and charge less: {method.method}+loss-free with the "
            f"{lower}. More strength would even the load, but what there is costs too much already."
        )
    if selecting is not None and lower and (raised := _changed(selecting, "speed", 3)):
        return f"Let the selection price do more, and the loss less: {raised}, {lower}."
    return (
        "More pressure would even the load, but costs too much already: keep this setting, or try "
        "a method that chooses experts by a price, such as loss-free."
    )


def _changed(part: Part | None, name: str, factor: float) -> str:
    """`strength of phi from 0.03 to about 0.01`; empty without such a setting."""
    value = part.number(name) if part else None
    if part is None or not value:
        return ""
    return f"{name} of {part.word} from {value:g} to about {factor * value:.2g}"


def _alike(findings: Sequence[Finding]) -> Finding:
    """The findings of one rule in one run as one: the first, with the layers of all."""
    first = findings[0]
    layers = tuple(dict.fromkeys(layer for finding in findings for layer in finding.layers))
    more = len(findings) - 1
    what = first.what if not more else f"{first.what[:-1]}, and {more} more layers likewise."
    return replace(first, what=what.replace("1 more layers", "1 more layer"), layers=layers)


def _urgency(finding: Finding) -> tuple[int, int]:
    known = finding.rule in _CAUSES
    return finding.severity.rank, _CAUSES.index(finding.rule) if known else len(_CAUSES)


def _where(count: int, runs: int, seed: int | None) -> str:
    if runs == 1:
        return ""
    return f"in {count} of {runs} runs" + ("" if seed is None else f", here seed {seed}")


def _paragraph(diagnosis: Diagnosis, width: int) -> list[str]:
    lines = wrapped("", _heading(diagnosis.method), width)
    for evidence in diagnosis.evidence[:_MOST]:
        finding = evidence.finding
        where = f" ({evidence.where})" if evidence.where else ""
        lines += wrapped(f"  {finding.severity:<8}  ", finding.what + where, width)
        lines += wrapped(" " * 12, finding.because, width)
    rest = [evidence.finding.rule for evidence in diagnosis.evidence[_MOST:]]
    if rest:
        lines += wrapped(f"  {'also':<8}  ", ", ".join(rest).replace("-", " "), width)
    if diagnosis.advice:
        lines += wrapped(f"{'':10}→ ", diagnosis.advice, width)
    if not diagnosis.evidence:
        lines.append("  ok        Nothing is found to be wrong.")
    return lines


def _heading(method: MethodSummary) -> str:
    """What was run: the method, the kind of micro-batches, how many seeds and steps."""
    runs = method.runs
    seeds = [str(run.seed) for run in runs if run.seed is not None]
    steps = sorted({run.last_step for run in runs})
    count = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    span = f"{count} step{'' if steps == [1] else 's'}"
    seed = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}" if seeds else ""
    where = str(runs[0].path.parent) if len(runs) == 1 else ""
    batching = runs[0].header.get("batching")
    return ", ".join(str(word) for word in (method.label, batching, seed, span, where) if word)
