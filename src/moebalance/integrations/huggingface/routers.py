"""Find the routers of a Transformers model and recognise the rule each one follows."""

import copy
import inspect
import logging
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from moebalance.core.state import bare_name
from moebalance.gates import Gate
from moebalance.integrations.huggingface.conventions import (
    BY_CLASS,
    COMMON,
    NOT_ROUTED,
    REFUSED,
    Answer,
    Convention,
)
from moebalance.integrations.rule import Rule, recognise
from moebalance.methods import Method, inner_methods

logger = logging.getLogger("moebalance")

NATIVE_BIAS = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Names under which Transformers' routers keep a selection bias."""
_PROBE_TOKENS = 64
_TRAINED_WHOLE = re.compile(r"\.modules_to_save\.[^.]+$")


@dataclass(frozen=True)
class Site:
    """One router of a model and what was found out about it.

    Attributes:
        name: of the router in the model, without DDP's and other wrappers around it.
        router: the module.
        block: the module around it, which may hold its selection bias.
        convention: how it answers.
        num_experts: E.
        top_k: K.
        gate: affinities from logits.
        rule: weights from affinities; None where they cannot be recomputed from outside.
        bias_name: of its selection bias, from the block; None if it has none.
        trainable: whether a gradient reaches any of its parameters.
    """

    name: str
    router: nn.Module
    block: nn.Module
    convention: Convention
    num_experts: int
    top_k: int
    gate: Gate
    rule: Rule | None
    bias_name: str | None
    trainable: bool

    @property
    def bias(self) -> Tensor | None:
        """The model's own selection bias, (E,) or (1, E); looked up anew, as models replace it."""
        if self.bias_name is None:
            return None
        owner, _, leaf = self.bias_name.rpartition(".")
        return cast(Tensor, getattr(self.block.get_submodule(owner), leaf))

    @property
    def why_fixed(self) -> str:
        """Why the choice of experts cannot be replaced from outside; empty if it can."""
        if self.convention.why_fixed:
            return self.convention.why_fixed
        if self.rule is None or not self.rule.plain_top_k:
            return "limits the choice by groups"
        return ""

    def read(self, output: Any) -> Answer:
        """Take the router's output apart."""
        return self.convention.read(output, self.top_k)

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """The carrier the router would give for another choice, (T, K) of experts."""
        if self.rule is None:
            raise ValueError(f"{self.name} {self.why_fixed}.")
        return self.convention.weigh(self.rule, self.router, logits, experts)


def transformers_model(model: nn.Module) -> PreTrainedModel | None:
    """The Transformers model in `model`, which may be wrapped (PEFT, DDP)."""
    found = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next(found, None)


def find_sites(model: nn.Module) -> list[Site]:
    """Find and recognise every MoE router of a model.

    Raises:
        ValueError: a router whose rule is unknown, or that chooses more experts than it has.
    """
    sites, passed_over = [], []
    for name, module in model.named_modules():
        if "original_module" in name.split("."):
            continue  # PEFT keeps what it replaced
        kind = type(module).__name__
        if kind in REFUSED:
            raise ValueError(f"{name} ({kind}) cannot be balanced: {REFUSED[kind]}.")
        if kind in NOT_ROUTED:
            passed_over.append(name)
        elif _looks_like_router(module):
            sites.append(_examine(model, name, module))
    if passed_over and sites:
        logger.info(
            "moebalance: %s and %d more route by a fixed table and are left alone.",
            passed_over[0],
            len(passed_over) - 1,
        )
    return sites


def check_levers(site: Site, method: Method) -> None:
    """Refuse a method that this router gives no lever to, or that knows too little of it.

    Raises:
        ValueError: the choice cannot be replaced and there is no bias; the router is frozen; or
            equal use of all its experts would be wrong, and that is what the method aims at.
    """
    if site.convention.why_shares and not _knows_shares(method):
        raise ValueError(
            f"{site.name} ({type(site.router).__name__}) cannot be balanced by {method!r}: "
            f"{site.convention.why_shares}. Say what part of the load each of its "
            f"{site.num_experts} columns shall have, those that compute nothing last: "
            "NegativeEntropy().relative_to(shares) in φ-balancing, proportions=… in other methods."
        )
    native = method.traits.has_selection_price and site.bias is not None
    if method.traits.selects and not native and site.why_fixed:
        raise ValueError(
            f"{method!r} chooses experts, but {site.name} ({type(site.router).__name__}) "
            f"{site.why_fixed} and has no selection bias for it: use a loss-lever method such "
            "as PhiBalancing."
        )
    if method.traits.charges and not site.trainable:
        raise ValueError(
            f"{method!r} works through the gradient of the router, but {site.name} is frozen. "
            "Train it (with PEFT: modules_to_save or target_parameters), or use a selection-lever "
            "method such as LossFree."
        )


def _knows_shares(method: Method) -> bool:
    """Whether every part of a method that balances aims at given shares."""
    if parts := inner_methods(method):
        return all(_knows_shares(part) for part in parts)
    return method.traits.aim is not None or not method.traits.balances


def _looks_like_router(module: nn.Module) -> bool:
    kind = type(module).__name__
    if kind in BY_CLASS:
        return True
    named = kind.endswith(("Router", "Gate", "Gating"))
    return named and isinstance(getattr(module, "top_k", None), int) and _matrix(module) is not None


def _examine(model: nn.Module, name: str, router: nn.Module) -> Site:
    # PEFT wraps a module whose weight it adapts (`gate` becomes `gate.base_layer`), and one that it
    # trains whole (`gate.modules_to_save.default`); the block is what held the router before.
    place = name.removesuffix(".base_layer")
    around = _TRAINED_WHOLE.sub("", place).rpartition(".")[0]
    block = model.get_submodule(around)
    convention = BY_CLASS.get(type(router).__name__, COMMON)
    try:
        top_k = convention.top_k(router, block)
    except AttributeError as error:
        raise _unknown(name, router, f"K is not where it should be: {error}") from error
    convention, answer, rule = _probe(name, router, convention, top_k)
    num_experts = answer.logits.shape[-1]
    gate = convention.gate or (rule.gate if rule is not None else None)
    if gate is None:
        raise _unknown(name, router, "its weights follow no gate of moebalance.gates.Gate")
    return Site(
        name=bare_name(model, name),
        router=router,
        block=block,
        convention=convention,
        num_experts=num_experts,
        top_k=top_k,
        gate=gate,
        rule=rule,
        bias_name=_native_bias(router, block, name.removeprefix(f"{around}.")),
        trainable=any(p.requires_grad for p in model.get_submodule(place).parameters()),
    )


def _probe(
    name: str, router: nn.Module, convention: Convention, top_k: int
) -> tuple[Convention, Answer, Rule | None]:
    """Recognise a router's rule by running its code on random weights and input, in float32.

    Random weights make the answer independent of the model's own, which may be sharded, quantised
    or not yet there; a selection bias is set to 0.
    """
    random = torch.Generator().manual_seed(0)
    tensors: Iterator[tuple[str, Tensor]] = iter(
        [*router.named_parameters(), *router.named_buffers()]
    )
    stand_in = {key: _stand_in(key, tensor, random) for key, tensor in tensors}
    matrix = _matrix(router)
    if matrix is None:
        raise _unknown(name, router, "it has no weight matrix")
    num_experts, hidden = matrix.shape
    # Logits of order one: the affinities then differ clearly and no weight underflows.
    tokens = torch.randn(1, _PROBE_TOKENS, hidden, generator=random) / hidden**0.5
    extra = [torch.zeros(num_experts) for _ in _bias_arguments(router)]
    # Of one expert a token, normalised, the weight is 1 under every gate: two tell gates apart.
    probed_k = 2 if top_k == 1 and hasattr(router, "top_k") else top_k
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"{name} sends each token to {top_k} of {num_experts} experts: top_k must lie in "
            "1..num_experts; mend the model's configuration."
        )
    bare = _without_hooks(router)
    if probed_k != top_k:
        cast(Any, bare).top_k = probed_k
    try:
        output = _call(bare, stand_in, tokens, extra)
        answer = convention.read(output, probed_k)
        if convention.gate is not None:
            return convention, answer, None
        if _are_probabilities(answer.logits):
            convention = replace(convention, probabilities=True)
            answer = convention.read(output, probed_k)
        weights = answer.carrier
        if weights.shape != answer.experts.shape:  # one column an expert
            weights = weights.gather(-1, answer.experts)
        rule = recognise(answer.logits, weights, answer.experts)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise _unknown(name, router, f"calling it on hidden states failed: {error}") from error
    if rule is None:
        raise _unknown(name, router, "its weights follow no gate that moebalance has")
    return convention, answer, rule


def _are_probabilities(x: Tensor) -> bool:
    """Whether rows are distributions, which the logits of random weights never are."""
    return bool((x >= 0).all()) and torch.allclose(x.sum(dim=-1), torch.ones(()))


def _without_hooks(router: nn.Module) -> nn.Module:
    """The router's own code and nothing hung on it; parameters and the rest are shared."""
    bare = copy.copy(router)
    bare._forward_hooks, bare._forward_pre_hooks = OrderedDict(), OrderedDict()
    return bare


@torch.no_grad()
def _call(
    router: nn.Module, stand_in: dict[str, Tensor], tokens: Tensor, extra: list[Tensor]
) -> Any:
    """Call a router on tokens (T, D), or (1, T, D) where it insists on the batch."""
    try:
        return functional_call(router, stand_in, (tokens[0], *extra))
    except (ValueError, IndexError):
        return functional_call(router, stand_in, (tokens, *extra))


def _stand_in(key: str, tensor: Tensor, random: torch.Generator) -> Tensor:
    leaf = key.rpartition(".")[2]
    if leaf in NATIVE_BIAS:
        return torch.zeros(tensor.shape)
    if leaf == "per_expert_scale":  # a factor on the weights, outside of the rule
        return torch.ones(tensor.shape)
    return torch.randn(tensor.shape, generator=random)


def _matrix(router: nn.Module) -> Tensor | None:
    """The map from hidden states to logits, (E, D)."""
    return next((p for p in router.parameters() if p.dim() == 2), None)


def _bias_arguments(router: nn.Module) -> list[str]:
    """Arguments of `forward` by which the block hands over its selection bias."""
    return [name for name in inspect.signature(router.forward).parameters if name in NATIVE_BIAS]


def _unknown(name: str, router: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"{name} ({type(router).__name__}) is a router of a kind moebalance does not know: {why}. "
        "Supported are routers that return (logits, weights, experts) with softmax or sigmoid "
        "affinities."
    )


def _native_bias(router: nn.Module, block: nn.Module, leaf: str) -> str | None:
    """Name of the selection bias, from the block: within the router, or beside it."""
    for name, _ in (*router.named_buffers(), *router.named_parameters()):
        if name.rpartition(".")[2] in NATIVE_BIAS:
            return f"{leaf}.{name}"
    beside = (name for name in _bias_arguments(router) if _is_tensor(getattr(block, name, None)))
    return next(beside, None)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
