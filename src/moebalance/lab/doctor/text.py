"""A diagnosis as plain text, for a terminal or a log."""

from moebalance.lab.doctor.diagnosis import Diagnosis, RouterGroup
from moebalance.lab.doctor.native_loss import TrainerUse
from moebalance.report.diagnosis.finding import Finding, wrapped

_INDENT = " " * 12


def render(diagnosis: Diagnosis, *, width: int = 100) -> str:
    """Lay out a diagnosis in lines of at most `width` characters where words allow it."""
    lines = [diagnosis.model]
    for group in diagnosis.routers:
        lines += ["", *_group(group, width)]
    if diagnosis.trainers:
        lines += ["", "Balancing without moebalance, if nothing is set:"]
        lines += [line for use in diagnosis.trainers for line in _trainer(use, width)]
    lines += ["", "Findings:"]
    lines += [line for finding in diagnosis.findings for line in _finding(finding, width)]
    if not diagnosis.findings:
        lines.append("  none: nothing speaks against balancing this model.")
    return "\n".join(lines)


def _group(group: RouterGroup, width: int) -> list[str]:
    routers = "router" if group.count == 1 else "routers"
    selection = group.selection or f"none: it {group.why_fixed}"
    if selection == "hook":
        selection = "by moebalance's hook, not exported"
    return [
        f"{group.count} {routers}: {group.where} ({group.kind})",
        *_line("experts", f"{group.num_experts}, top {group.top_k}", width),
        *_line("weights", group.weights, width),
        *_line("loss lever", "yes", width),
        *_line("selection", selection, width),
    ]


def _trainer(use: TrainerUse, width: int) -> list[str]:
    return wrapped(f"  {use.trainer:<20} {'ON ' if use.active else 'off'}  ", use.why, width)


def _finding(finding: Finding, width: int) -> list[str]:
    lines = wrapped(f"  {finding.severity:<8}  ", finding.what, width)
    if finding.do:
        lines += wrapped(f"{_INDENT}→ ", finding.do, width)
    return lines


def _line(title: str, text: str, width: int) -> list[str]:
    return wrapped(f"  {title:<11} ", text, width)
