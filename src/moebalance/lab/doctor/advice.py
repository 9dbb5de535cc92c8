"""What a model's configuration and code mean for balancing it, in plain words."""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from moebalance.integrations.huggingface.exporting import USUAL_RATE, rounding
from moebalance.integrations.huggingface.routers import Site
from moebalance.lab.doctor.native_loss import native_loss, trainer_uses
from moebalance.report.diagnosis.finding import Finding, Severity


def check_levers(model: PreTrainedModel, sites: Sequence[Site]) -> list[Finding]:
    """What a method that prices selection runs into with these routers."""
    fixed = [site for site in sites if site.bias_name is None and site.why_fixed]
    hooked = [site for site in sites if site.bias_name is None and not site.why_fixed]
    rounded = [site for site in sites if site.bias_name and not in_float32(model, site)]
    unequal = [site for site in sites if site.convention.why_shares]
    findings = []
    if unequal:
        findings.append(
            Finding(
                Severity.WARNING,
                f"{unequal[0].name} and its like: {unequal[0].convention.why_shares}.",
                "Say what part of the load each of the router's columns should get "
                "(docs/targets.md); a method without shares is refused.",
            )
        )
    if rounded:
        step = rounding(torch.tensor([0.5]), torch.bfloat16).step
        findings.append(
            Finding(
                Severity.NOTE,
                f"The selection bias takes the model's dtype: in bfloat16, prices of 0.5 to 1 have "
                f"steps of {step:.2g}, {step / USUAL_RATE:.2g} times loss-free's usual update of "
                f"{USUAL_RATE:g}.",
                "For a method that prices selection, load in float32 (and train with bf16=True), "
                "or keep this one tensor in float32.",
            )
        )
    if fixed:
        findings.append(
            Finding(
                Severity.NOTE,
                f"{fixed[0].name} and its like can be charged in the loss only: the router "
                f"{fixed[0].why_fixed}, and has no selection bias.",
                "Use PhiBalancing or another method that charges in the loss; LossFree is refused.",
            )
        )
    if hooked:
        findings.append(
            Finding(
                Severity.NOTE,
                "The family has no selection bias: a price trained by LossFree or "
                "QuantileBalancing acts through moebalance's hook only and does not leave with "
                "save_pretrained; moebalance.huggingface.export refuses it.",
                "To export the model, use a method that charges in the loss, such as PhiBalancing.",
            )
        )
    return findings


def check_native_loss(model: PreTrainedModel, sites: Sequence[Site]) -> list[Finding]:
    """Whether the family's own loss is active, ignored or missing."""
    loss = native_loss(model)
    if loss.ignored:
        return [
            Finding(
                Severity.WARNING,
                "output_router_logits is on, but this family computes no balancing loss from it: "
                "nothing balances this model in training.",
                "Attach a method of moebalance.",
            )
        ]
    if not loss.computed:
        native = any(site.bias_name is not None for site in sites)
        untouched = ", and the selection bias stays as it was loaded" if native else ""
        return [
            Finding(
                Severity.NOTE,
                "Without moebalance nothing balances this family in Transformers: it computes no "
                f"balancing loss{untouched}.",
                "Attach a method of moebalance.",
            )
        ]
    active = [use.trainer for use in trainer_uses(model) if use.active]
    if active:
        return [
            Finding(
                Severity.NOTE,
                f"The family's own balancing loss is active in {', '.join(active)}. It pools all "
                "layers into one load, so layers that collapse on different experts look balanced.",
                "attach() switches it off and says so. Without moebalance, it is yours to set.",
            )
        ]
    return []


def in_float32(model: PreTrainedModel, site: Site) -> bool:
    """Whether the selection bias stays float32 in a model that is loaded in bfloat16."""
    bias = site.bias
    if bias is not None and bias.dtype == torch.float32:  # the model is built in bfloat16
        return True
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    name = f"{site.name.rpartition('.')[0]}.{site.bias_name}"
    return any(re.search(rf"(^|\.){word}(\.|$)", name) for word in kept)
