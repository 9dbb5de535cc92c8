"""Say what balancing a model offers, what balances it already, and what its files lost.

Meant for the time before a GPU is rented: no weights are loaded, and of a checkpoint folder only
the tensors that matter to routing are read.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moebalance.integrations.huggingface.routers import Site, find_sites
from moebalance.integrations.huggingface.scan import Weights, open_weights
from moebalance.lab.console import counted
from moebalance.lab.doctor.advice import check_levers, check_native_loss, in_float32
from moebalance.lab.doctor.build import build, configuration
from moebalance.lab.doctor.native_loss import TrainerUse, trainer_uses
from moebalance.lab.doctor.state import check_state, read_state
from moebalance.lab.doctor.weights import (
    and_more,
    check_biases,
    check_resuming,
    check_routers,
)
from moebalance.report.diagnosis.finding import Finding, Severity


@dataclass(frozen=True)
class RouterGroup:
    """Routers of a model that are alike.

    Attributes:
        where: their names, with the layers in braces.
        count: how many.
        kind: class name.
        num_experts: E.
        top_k: K.
        weights: how weights come from logits, in words.
        selection: the selection lever, in words; empty if there is none.
        why_fixed: why the choice cannot be replaced from outside; empty if it can.
    """

    where: str
    count: int
    kind: str
    num_experts: int
    top_k: int
    weights: str
    selection: str
    why_fixed: str


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        target: what was asked about.
        model: class name and model type.
        routers: alike ones together; empty where there is nothing to balance.
        trainers: what each trainer does with the model's own balancing loss.
        findings: worst first.
    """

    target: str
    model: str
    routers: tuple[RouterGroup, ...]
    trainers: tuple[TrainerUse, ...]
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> bool:
        """Whether a finding is an error."""
        return any(finding.severity is Severity.ERROR for finding in self.findings)


def diagnose(target: str | Path) -> Diagnosis:
    """Look at a model type, a configuration file or a checkpoint folder.

    Args:
        target: a model type such as "qwen3_moe"; a `config.json`; or a folder with one, with or
            without safetensors files: a model, a PEFT adapter, a Trainer's checkpoint.

    Raises:
        ValueError: it is none of these, or Transformers cannot build a model from it.
    """
    folder = Path(target) if Path(target).is_dir() else None
    config, adapter = configuration(target)
    model = build(target, config)
    weights = None if folder is None else open_weights(folder)
    findings: list[Finding] = []
    try:
        sites = find_sites(model)
    except ValueError as error:
        sites = []
        findings.append(Finding(Severity.ERROR, f"moebalance cannot balance this model: {error}"))
    if not sites and not findings:
        findings.append(
            Finding(
                Severity.ERROR,
                f"{type(model).__name__} has no MoE router.",
                "Give a Mixture-of-Experts model.",
            )
        )
    if sites:
        findings += check_levers(model, sites)
        findings += check_native_loss(model, sites)
        findings += _check_folder(folder, weights, model, sites, adapter)
    order = list(Severity)
    return Diagnosis(
        target=str(target),
        model=f"{type(model).__name__} ({config.model_type})",
        routers=_groups(model, sites),
        trainers=trainer_uses(model) if sites else (),
        findings=tuple(sorted(findings, key=lambda f: -order.index(f.severity))),
    )


def _groups(model: PreTrainedModel, sites: Sequence[Site]) -> tuple[RouterGroup, ...]:
    alike: dict[tuple[Any, ...], list[Site]] = {}
    for site in sites:
        key = (
            re.sub(r"\b\d+\b", "N", site.name),
            type(site.router).__name__,
            site.num_experts,
            site.top_k,
            _weights(site),
            _selection(model, site),
        )
        alike.setdefault(key, []).append(site)
    return tuple(
        RouterGroup(
            where=_collapsed([site.name for site in group]),
            count=len(group),
            kind=kind,
            num_experts=num_experts,
            top_k=top_k,
            weights=weights,
            selection=selection,
            why_fixed=group[0].why_fixed,
        )
        for (_, kind, num_experts, top_k, weights, selection), group in alike.items()
    )


def _weights(site: Site) -> str:
    gate = type(site.gate).__name__.lower()
    if site.rule is None:
        return f"{gate}; {site.why_fixed}"
    factor = "" if site.rule.scaling == 1 else f"{site.rule.scaling:g} × "
    divided = ", divided by the sum over the chosen" if site.rule.normalized else ""
    groups = "" if site.rule.plain_top_k else "; the choice is limited by groups"
    return f"{factor}{gate}{divided}{groups}"


def _selection(model: PreTrainedModel, site: Site) -> str:
    bias = site.bias
    if bias is None:
        return "" if site.why_fixed else "hook"
    dtype = "kept in float32" if in_float32(model, site) else "in the model's dtype"
    return f"native: {site.bias_name}, {dtype}"


def _check_folder(
    folder: Path | None,
    weights: Weights | None,
    model: PreTrainedModel,
    sites: Sequence[Site],
    adapter: dict[str, Any] | None,
) -> list[Finding]:
    if folder is None or weights is None:
        return []
    findings = []
    state = read_state(folder)
    if adapter is not None:
        findings += _check_adapter(sites, weights)
    elif weights.files:
        findings += [*check_routers(sites, weights), *check_biases(sites, weights)]
        if (folder / "trainer_state.json").is_file():
            findings += check_resuming(model, weights)
    elif any(folder.glob("*.bin")):
        findings.append(Finding(Severity.NOTE, "Only safetensors files are read; there are none."))
    if weights.absent:
        findings.append(
            Finding(
                Severity.ERROR,
                f"The index names {counted(len(weights.absent), 'file')} that cannot be found: "
                f"{and_more(weights.absent)}.",
                "Copy or download the rest of the checkpoint.",
            )
        )
    if state is not None:
        findings += check_state(state, sites, weights)
    return findings


def _check_adapter(sites: Sequence[Site], weights: Weights) -> list[Finding]:
    """An adapter holds what it trains: does it train the routers, and hold their biases?"""
    trained = [site for site in sites if _adapted(site, weights.files)]
    if len(trained) == len(sites):
        return [Finding(Severity.OK, "The adapter trains every router.")]
    biased = any(site.bias_name is not None for site in sites)
    return [
        Finding(
            Severity.NOTE,
            f"The adapter leaves {len(sites) - len(trained)} of {len(sites)} routers frozen: "
            "methods that charge in the loss are refused there"
            + (", and it has no place for a selection price." if biased else "."),
            "To train routers with it, name them in target_parameters or modules_to_save"
            + ("; to keep a price, merge the adapter and save the whole model." if biased else "."),
        )
    ]


def _adapted(site: Site, keys: Iterable[str]) -> bool:
    name = f".{site.name}."
    return any(name in f".{key}" for key in keys)


def _collapsed(names: Sequence[str]) -> str:
    """`a.0.b`, `a.1.b`, `a.3.b` → `a.{0–1,3}.b`."""
    words = [name.split(".") for name in names]
    return ".".join(
        column[0] if len(set(column)) == 1 else "{" + _runs(column) + "}"
        for column in zip(*words, strict=True)
    )


def _runs(numbers: Sequence[str]) -> str:
    values = sorted({int(number) for number in numbers})
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs)
