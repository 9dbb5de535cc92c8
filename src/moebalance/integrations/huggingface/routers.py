"""Find the routers of a Transformers model and recognise the rule each one follows."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
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
from moebalance.integrations.huggingface.probe import (
    NATIVE_BIAS,
    bias_arguments,
    probe,
    unknown,
    whole_shape,
)
from moebalance.integrations.rule import Rule

logger = logging.getLogger("moebalance")

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
        bias_owner: the module that holds it.
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
    bias_owner: nn.Module | None
    trainable: bool

    @property
    def bias(self) -> Tensor | None:
        """The model's own selection bias, (E,) or (1, E); looked up anew, as models replace it."""
        if self.bias_name is None:
            return None
        # Not by its name from the block: merging an adapter takes away what PEFT put between them.
        return cast(Tensor, getattr(self.bias_owner, self.bias_name.rpartition(".")[2]))

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


class Candidate(NamedTuple):
    """A module that looks like a router, before anything is found out about it.

    Attributes:
        name: of the module in the model.
        module: itself.
        learns: whether a gradient reaches any of its parameters.
    """

    name: str
    module: nn.Module
    learns: bool


class Survey(NamedTuple):
    """The routers of a model by what can be done with them.

    Attributes:
        routers: in use, one by one to be examined.
        idle: names of copies that belong to PEFT adapters that are not active.
        by_table: names of routers whose choice is a fixed table.
        unrouted: names of MoE blocks without any of these.
    """

    routers: list[Candidate]
    idle: list[str]
    by_table: list[str]
    unrouted: list[str]


def survey(model: nn.Module) -> Survey:
    """Find what looks like a router, and MoE blocks where nothing does."""
    routers, idle, by_table = [], [], []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in NOT_ROUTED:
            by_table.append(name)
        elif kind in REFUSED or _looks_like_router(module):
            if _in_use(model, name):
                held = model.get_submodule(name.removesuffix(".base_layer"))
                learns = any(parameter.requires_grad for parameter in held.parameters())
                routers.append(Candidate(name, module, learns))
            elif "original_module" not in name.split("."):
                idle.append(name)
    known = [*(router.name for router in routers), *idle, *by_table]
    return Survey(routers, idle, by_table, _unrouted(model, known))


def find_sites(model: nn.Module) -> list[Site]:
    """Find and recognise every MoE router that a model uses.

    Raises:
        ValueError: a router whose rule is unknown, or that chooses more experts than it has.
    """
    found = survey(model)
    sites = [examine(model, candidate) for candidate in found.routers]
    if found.by_table and sites:
        logger.info(
            "moebalance: %s and %d more route by a fixed table and are left alone.",
            found.by_table[0],
            len(found.by_table) - 1,
        )
    return sites


def examine(model: nn.Module, candidate: Candidate) -> Site:
    """Recognise one router.

    Raises:
        ValueError: its rule is unknown, or it chooses more experts than it has.
    """
    name, router, learns = candidate
    kind = type(router).__name__
    if kind in REFUSED:
        raise ValueError(f"{name} ({kind}) cannot be balanced: {REFUSED[kind]}.")
    # PEFT wraps a module whose weight it adapts (`gate` becomes `gate.base_layer`), and one that it
    # trains whole (`gate.modules_to_save.default`); the block is what held the router before.
    around = _TRAINED_WHOLE.sub("", name.removesuffix(".base_layer")).rpartition(".")[0]
    block = model.get_submodule(around)
    convention = BY_CLASS.get(kind, COMMON)
    try:
        top_k = convention.top_k(router, block)
    except AttributeError as error:
        raise unknown(name, router, f"K is not where it should be: {error}") from error
    convention, answer, rule = probe(name, router, convention, top_k)
    gate = convention.gate or (rule.gate if rule is not None else None)
    if gate is None:
        raise unknown(name, router, "its weights follow no gate that moebalance has")
    bias_name, bias_owner = _native_bias(router, block, name.removeprefix(f"{around}."))
    return Site(
        name=bare_name(model, name),
        router=router,
        block=block,
        convention=convention,
        num_experts=answer.logits.shape[-1],
        top_k=top_k,
        gate=gate,
        rule=rule,
        bias_name=bias_name,
        bias_owner=bias_owner,
        trainable=learns,
    )


def _looks_like_router(module: nn.Module) -> bool:
    kind = type(module).__name__
    if kind in BY_CLASS:
        return True
    named = kind.endswith(("Router", "Gate", "Gating"))
    if not named or not isinstance(getattr(module, "top_k", None), int):
        return False
    return any(len(whole_shape(parameter)) == 2 for parameter in module.parameters())


def _in_use(model: nn.Module, name: str) -> bool:
    """Whether a module is run: not what PEFT replaced, nor a copy of an adapter not active."""
    words = name.split(".")
    if "original_module" in words:
        return False
    for number, word in enumerate(words[:-1]):
        if word == "modules_to_save":
            wrapper = model.get_submodule(".".join(words[:number]))
            active = getattr(wrapper, "active_adapters", None)
            if active is not None and words[number + 1] not in active:
                return False
    return True


def _unrouted(model: nn.Module, routers: Sequence[str]) -> list[str]:
    """MoE blocks, each the module around its experts, that hold none of these routers."""
    found: list[str] = []
    within = ""  # the container of experts that is being walked through
    for name, module in model.named_modules():
        if within and name.startswith(within):
            continue
        leaf, kind = name.rpartition(".")[2], type(module).__name__
        if leaf != "experts" and not kind.endswith("Experts"):
            continue
        within = f"{name}."
        block = name.rpartition(".")[0]
        holds = any(router.startswith(f"{block}." if block else "") for router in routers)
        if not (holds or block in routers or block in found):
            found.append(block)
    return found


def _native_bias(
    router: nn.Module, block: nn.Module, leaf: str
) -> tuple[str | None, nn.Module | None]:
    """The selection bias's name, from the block, and its owner: in the router, or next to it."""
    for name, _ in (*router.named_buffers(), *router.named_parameters()):
        owner, _, last = name.rpartition(".")
        if last in NATIVE_BIAS:
            return f"{leaf}.{name}", router.get_submodule(owner)
    for name in bias_arguments(router):
        if _is_tensor(getattr(block, name, None)):
            return name, block
    return None, None


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
