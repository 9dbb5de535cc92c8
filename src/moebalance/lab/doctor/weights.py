"""What a checkpoint folder says about routing: its selection biases and router weights.

Only these tensors are read. A selection bias that was trained and is not in the files, or that a
low precision has rounded, makes a model route otherwise than in training and shows nowhere else.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moebalance.gates import Sigmoid, Softmax
from moebalance.integrations.huggingface.exporting import USUAL_RATE, rounding
from moebalance.integrations.huggingface.routers import Site
from moebalance.integrations.huggingface.scan import Weights
from moebalance.lab.console import counted
from moebalance.report.diagnosis.finding import Finding, Severity


def check_biases(sites: Sequence[Site], weights: Weights) -> list[Finding]:
    """Judge the selection biases stored for these routers; nothing if the family has none."""
    slots = [site for site in sites if site.bias_name is not None]
    stored = {site.name: bias for site in slots if (bias := weights.bias(site)) is not None}
    if not slots:
        return []
    findings = []
    missing = [site.name for site in slots if site.name not in stored]
    if missing:
        findings.append(
            Finding(
                Severity.ERROR,
                f"The selection bias of {and_more(missing)} is not in the files: it was dropped "
                "on export. The model starts with 0 there and routes otherwise than in training.",
                "Export again with save_pretrained, or moebalance.huggingface.export.",
            )
        )
    misfits = [s.name for s in slots if s.name in stored and not _fits(s, stored[s.name])]
    if misfits:
        findings.append(
            Finding(
                Severity.ERROR,
                f"The selection bias of {and_more(misfits)} has {stored[misfits[0]].numel()} "
                "values, which is not the number of experts in the configuration.",
                "Give the configuration that this checkpoint was saved with.",
            )
        )
    sick = [name for name, bias in stored.items() if not _finite(bias)]
    if sick:
        findings.append(
            Finding(
                Severity.ERROR,
                f"The selection bias of {and_more(sick)} has NaN or infinite values.",
                "Take an earlier checkpoint.",
            )
        )
    sound = {name: bias for name, bias in stored.items() if name not in (*sick, *misfits)}
    if sound:
        findings += _check_values([site for site in slots if site.name in sound], sound)
    return findings


def check_routers(sites: Sequence[Site], weights: Weights) -> list[Finding]:
    """Judge the router weights stored for these routers."""
    absent, sick = [], []
    for site in sites:
        weight = weights.router_weight(site)
        if weight is None:
            absent.append(site.name)
        elif not _finite(weight):
            sick.append(site.name)
    findings = []
    if sick:
        findings.append(
            Finding(
                Severity.ERROR,
                f"The router weight of {and_more(sick)} has NaN or infinite values.",
                "Take an earlier checkpoint.",
            )
        )
    if absent:
        findings.append(
            Finding(
                Severity.WARNING,
                f"The router weight of {and_more(absent)} was not found in the files.",
                "See that all shards are there, and that the configuration is this checkpoint's.",
            )
        )
    if not findings:
        findings.append(Finding(Severity.OK, f"{len(sites)} router weights, all finite."))
    return findings


def check_resuming(model: PreTrainedModel, weights: Weights) -> list[Finding]:
    """Whether a Trainer that resumes from these files would load all of them.

    It hands them to `load_state_dict` as they are (Transformers 5.23), whereas `save_pretrained`
    has renamed and split the experts of most families; what does not match is passed over.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    passed_over = sorted(set(model.state_dict()) - set(weights.files) - tied)
    if not passed_over:
        return []
    return [
        Finding(
            Severity.WARNING,
            f"Trainer.train(resume_from_checkpoint=…) would leave {and_more(passed_over)} as the "
            "model has them: they have other names in the files, and it does not translate.",
            "Load the model itself from this folder with from_pretrained before resuming.",
        )
    ]


def and_more(names: Sequence[str]) -> str:
    """`first`, or `first and n more`."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _check_values(sites: Sequence[Site], biases: Mapping[str, Tensor]) -> list[Finding]:
    """Judge finite biases: zero, rounded, out of range."""
    findings = []
    zero = [name for name, bias in biases.items() if not bool(bias.any())]
    if zero:
        every = len(zero) == len(biases)
        which = "Every selection bias" if every else f"The selection bias of {and_more(zero)}"
        findings.append(
            Finding(
                Severity.WARNING,
                f"{which} is 0: never trained, or dropped on export.",
                "If the model was trained with a selection price, export it again.",
            )
        )
    findings += _check_precision(biases)
    unreachable = {
        site.name: found for site in sites if (found := _unreachable(site, biases[site.name]))
    }
    if unreachable:
        name, count = max(unreachable.items(), key=lambda item: item[1])
        findings.append(
            Finding(
                Severity.WARNING,
                f"In {counted(len(unreachable), 'router')} the bias of some experts lies so far "
                f"below the others' that no token can choose them (most: {count} in {name}). "
                "Affinities lie between 0 and 1.",
                "Lower the rate of the method that trained it, or recentre and train on.",
            )
        )
    if not findings:
        kinds = " and ".join(sorted({_kind(bias.dtype) for bias in biases.values()}))
        low = min(bias.min().item() for bias in biases.values())
        high = max(bias.max().item() for bias in biases.values())
        findings.append(
            Finding(
                Severity.OK,
                f"{len(biases)} selection biases, {kinds}, from {low:.3g} to {high:.3g}.",
            )
        )
    return findings


def _check_precision(biases: Mapping[str, Tensor]) -> list[Finding]:
    low = {n: b for n, b in biases.items() if b.dtype in (torch.bfloat16, torch.float16)}
    low = {name: bias for name, bias in low.items() if bool(bias.any())}
    if not low:
        return []
    steps = {name: rounding(bias, bias.dtype).step for name, bias in low.items()}
    name = max(steps, key=lambda each: steps[each])
    bias, step = low[name], steps[name]
    return [
        Finding(
            Severity.WARNING,
            f"{len(low)} selection biases are stored in {_kind(bias.dtype)}. Around "
            f"{bias.abs().max().item():.3g} (in {name}) its steps are {step:.2g}, "
            f"{step / USUAL_RATE:.2g} times loss-free's usual update of {USUAL_RATE:g}.",
            "Keep selection biases in float32 in training and in the files.",
        )
    ]


def _unreachable(site: Site, bias: Tensor) -> int:
    """Number of experts that K others beat under any affinities in (0, 1)."""
    plain = site.rule is not None and site.rule.plain_top_k
    bounded = isinstance(site.gate, Softmax | Sigmoid)
    if not plain or not bounded or type(site.router).__name__ in _BIASES_LOGITS:
        return 0
    values = bias.reshape(-1).float()
    bar = values.topk(site.top_k).values[-1] - 1
    return int((values <= bar).sum())


_BIASES_LOGITS = frozenset({"Kolibri1TopKRouter"})
"""Routers that add the bias to logits, which have no bounds, instead of affinities."""


def _fits(site: Site, bias: Tensor) -> bool:
    return bias.numel() == site.num_experts


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float()).all())


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
