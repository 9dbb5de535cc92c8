"""Find the routers of a Transformers model and recognise the rule each one follows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from moebalance.balancers.base import Balancer
from moebalance.sites import Rule, recognise

_NATIVE_BIAS = ("e_score_correction_bias", "expert_bias", "balancing_biases")
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class Site:
    """One router of a model and what was found out about it."""

    name: str
    router: nn.Module
    num_experts: int
    top_k: int
    rule: Rule
    bias_name: str | None
    trainable: bool

    @property
    def bias(self) -> Tensor | None:
        """The model's own selection bias, (E,) or (1, E); looked up anew, as models replace it."""
        if self.bias_name is None:
            return None
        owner, _, leaf = self.bias_name.rpartition(".")
        return cast(Tensor, getattr(self.router.get_submodule(owner), leaf))


def transformers_model(model: nn.Module) -> PreTrainedModel | None:
    """The Transformers model in `model`, which may be wrapped (PEFT, DDP)."""
    found = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next(found, None)


def find_sites(model: nn.Module) -> list[Site]:
    """Find and recognise every MoE router of a model.

    Raises:
        ValueError: a router whose rule is unknown, or that chooses more experts than it has.
    """
    sites = []
    for name, module in model.named_modules():
        if not _looks_like_router(module) or "original_module" in name.split("."):
            continue
        weight = cast(Tensor, module.weight)
        num_experts, top_k = weight.shape[0], cast(int, module.top_k)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{name} sends each token to {top_k} of {num_experts} experts: top_k must lie in "
                "1..num_experts; mend the model's configuration."
            )
        # PEFT wraps a module whose weight it adapts: `gate` becomes `gate.base_layer`.
        adapted = model.get_submodule(name.removesuffix(".base_layer"))
        trainable = any(parameter.requires_grad for parameter in adapted.parameters())
        rule, bias = _probe(name, module), _native_bias(module)
        sites.append(Site(name, module, num_experts, top_k, rule, bias, trainable))
    return sites


def check_levers(site: Site, balancer: Balancer) -> None:
    """Refuse a method that this router gives no lever to.

    Raises:
        ValueError: the choice is limited by groups and has no bias, or the router is frozen.
    """
    native = balancer.prices_selection and site.bias is not None
    if balancer.selects and not native and not site.rule.plain_top_k:
        raise ValueError(
            f"{balancer!r} chooses experts, but {site.name} ({type(site.router).__name__}) limits "
            "the choice by groups and has no selection bias for it: use a loss-lever method such "
            "as PhiBalancing."
        )
    if balancer.charges and not site.trainable:
        raise ValueError(
            f"{balancer!r} works through the gradient of the router, but {site.name} is frozen. "
            "Train it (with PEFT: modules_to_save or target_parameters), or use a selection-lever "
            "method such as LossFree."
        )


def _looks_like_router(module: nn.Module) -> bool:
    named = type(module).__name__.endswith(("Router", "Gate", "Gating"))
    weight = getattr(module, "weight", None)
    return (
        named
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and isinstance(getattr(module, "top_k", None), int)
    )


def _probe(name: str, router: nn.Module) -> Rule:
    """Recognise a router's rule by running its code on random weights and input, in float32.

    Random weights make the answer independent of the model's own, which may be sharded, quantised
    or not yet there; a selection bias is set to 0.
    """
    random = torch.Generator().manual_seed(0)
    tensors: Iterator[tuple[str, Tensor]] = iter(
        [*router.named_parameters(), *router.named_buffers()]
    )
    stand_in = {
        key: torch.zeros(tensor.shape)
        if key.rpartition(".")[2] in _NATIVE_BIAS
        else torch.randn(tensor.shape, generator=random)
        for key, tensor in tensors
    }
    hidden = stand_in["weight"].shape[1]
    # Logits of order one: the affinities then differ clearly and no weight underflows.
    tokens = torch.randn(_PROBE_TOKENS, hidden, generator=random) / hidden**0.5
    try:
        with torch.no_grad():
            output = functional_call(router, stand_in, (tokens,))
        logits, weights, experts = output[:3]
        rule = recognise(logits, weights, experts)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _unknown(name, router, f"calling it on hidden states failed: {error}") from error
    if rule is None:
        raise _unknown(name, router, "its weights follow neither softmax nor sigmoid of its logits")
    return rule


def _unknown(name: str, router: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"{name} ({type(router).__name__}) is a router of a kind moebalance does not know: {why}. "
        "Supported are routers that return (logits, weights, experts) with softmax or sigmoid "
        "affinities."
    )


def _native_bias(router: nn.Module) -> str | None:
    names = [name for name, _ in (*router.named_buffers(), *router.named_parameters())]
    return next((name for name in names if name.rpartition(".")[2] in _NATIVE_BIAS), None)
