"""One call that attaches a method to any MoE model."""

from __future__ import annotations

import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moebalance.core.distributed import Group
from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.core.state import bare_name
from moebalance.gates import Gate, GroupLimit
from moebalance.integrations.names import Layers, chosen, without_adapters
from moebalance.integrations.reminders import StepReminder
from moebalance.methods import Method, recommended
from moebalance.router import BalancedRouter, CountAndCharge

if TYPE_CHECKING:
    from moebalance.integrations.named import Routers

_HANDLES: weakref.WeakKeyDictionary[LayerBalance, weakref.ref[Balancing]] = (
    weakref.WeakKeyDictionary()
)
"""Who steps a router. Not kept on it: a copy of the model is nobody's yet."""


def attach(
    model: nn.Module,
    method: Method | None = None,
    *,
    layers: Layers | None = None,
    group: Group | None = None,
    keep_native_loss: bool = False,
    fused: bool = True,
    routers: Routers | None = None,
    top_k: int | None = None,
    gate: Gate | None = None,
    normalize: bool | None = None,
    limit: GroupLimit | None = None,
    num_experts: int | None = None,
    mask: str | None = None,
    cu_seqlens: str | None = None,
) -> Balancing:
    """Balance every MoE router of a model, without changing the model.

    For a model of your own, name the modules that return the logits of its routers:
    `attach(model, method, routers="*.gate", top_k=2)`. Attach before compiling; before or after
    moving to another dtype or, uncompiled, to another device. With PEFT, attach to what
    `get_peft_model` returned.

    Args:
        model: a Transformers MoE model (PEFT-wrapped or not), or any module with `BalancedRouter`s.
        method: the method; None for the `recommended` one, in the form that suits the routers.
            A model of `BalancedRouter`s carries its own: leave it out, or give the same.
        layers: which routers, by name: a glob pattern such as `"*.layers.[0-3].*"`, a list of
            them, or a function of the name; None for all. A router that is frozen while others
            train is left out anyway, with a warning.
        group: the ranks that hold these layers and disjoint tokens; None for the default process
            group where there is one.
        keep_native_loss: leave a Transformers model's own balancing loss on, as one who only
            watches would.
        fused: whether to take the fused kernels where they run: on an NVIDIA GPU with Triton.
        routers: modules that return logits, such as an `nn.Linear`: a glob pattern over module
            names such as `"*.gate"`, a list of names or modules, or a function of the name. The
            logits are the output, or its first tensor. Where no module returns logits: a method
            that does, `"*.get_logits"`, or the parameter that the layer makes them with, `"*.wg"`;
            both need `num_experts`. None to look for routers that are known.
        top_k: with `routers`: K, experts per token.
        gate: with `routers`: how the layer's scores come from logits; None for `Softmax()`.
        normalize: with `routers`: whether the layer divides a token's K weights by their sum. Only
            a method that selects needs to know.
        limit: with `routers`: the groups of experts that a token may choose from.
        num_experts: with `routers`: E, where a module's `out_features` or weight does not tell.
        mask: with `routers`: name of the argument of the model's forward that is True (or 1) for
            real tokens. None to count all tokens.
        cu_seqlens: with `routers`: name of the argument of the model's forward that holds where
            packed sequences begin and end, for example [0, 5, 12] for lengths 5 and 7. Tokens
            behind the last entry are padding. None if text is not packed.

    Returns:
        The handle: `step()` after each optimizer step, `metrics()`, `state_dict()`, `detach()`.

    Raises:
        ValueError: no router found or chosen, one of an unknown kind, one balanced already, all of
            them frozen under a method that needs their gradient, or a lever that one does not have.
        TypeError: `model` or `method` is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach needs a torch module; got {type(model).__name__}.")
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"method={method!r}: must be a Method such as PhiBalancing(strength=1e-3).")
    own = own_routers(model)
    said: dict[str, Any] = {"top_k": top_k, "gate": gate, "normalize": normalize, "limit": limit}
    said |= {"num_experts": num_experts, "mask": mask, "cu_seqlens": cu_seqlens}
    if routers is not None:
        return _named(model, method, routers, said, own, layers, group, fused=fused)
    told = [name for name, value in said.items() if value is not None]
    if told:
        raise ValueError(
            f"{told[0]}= describes the modules that routers= names: also give routers."
        )
    if own:
        return _own(model, own, method, layers, group, fused=fused)
    # Asking for Transformers would import it; a model of its kind can only exist if it is there.
    if "transformers" in sys.modules:
        from moebalance.integrations import huggingface

        if huggingface.serves(model):
            return huggingface.attach(
                model,
                method,
                layers=layers,
                group=group,
                keep_native_loss=keep_native_loss,
                fused=fused,
            )
    from moebalance.integrations.named import suggestion

    raise ValueError(
        f"{type(model).__name__} is neither a Transformers model nor has it a "
        f"moebalance.BalancedRouter: {suggestion(model)} Or route its MoE layers with "
        "BalancedRouter (see the example examples/plain_pytorch.py). For a Megatron-Core model, "
        "take balanced_spec and attach of moebalance.integrations.megatron."
    )


def own_routers(model: nn.Module) -> dict[str, LayerBalance]:
    """The modules of ours in a model, which carry their method, by name."""
    ours = (BalancedRouter, CountAndCharge)
    return {name: module for name, module in model.named_modules() if isinstance(module, ours)}


def _named(
    model: nn.Module,
    method: Method | None,
    routers: Routers,
    said: dict[str, Any],
    own: dict[str, LayerBalance],
    layers: Layers | None,
    group: Group | None,
    *,
    fused: bool,
) -> Balancing:
    if own:
        raise ValueError(
            f"This model has BalancedRouters, such as {next(iter(own))}, which carry their method: "
            "call attach(model) without routers=."
        )
    if layers is not None:
        raise ValueError(f"layers={layers!r} and routers= both choose: routers= alone is enough.")
    from moebalance.integrations import named as by_name

    how = by_name.rule(**said)
    if method is None:  # where another choice would change the weights, φ works alone
        method = recommended(choosable=bool(how.normalize) or not how.gate.sums_to_one)
    found = by_name.find(model, routers, how, method)
    return by_name.attach(model, method, found, how, group=group, fused=fused)


def _own(
    model: nn.Module,
    routers: dict[str, LayerBalance],
    method: Method | None,
    layers: Layers | None,
    group: Group | None,
    *,
    fused: bool,
) -> Balancing:
    named = {bare_name(model, wrapped): router for wrapped, router in routers.items()}
    balanced = {name or "router": named[name] for name in chosen(named, layers)}
    taken = [name for name, router in balanced.items() if _handle_of(router) is not None]
    if taken:
        raise ValueError(
            f"{taken[0]} is balanced already: detach() the first Balancing before attaching again, "
            "or give it to monitor() to watch it."
        )
    methods = {router.method for router in balanced.values()}
    if method is not None and methods != {method}:
        raise ValueError(
            f"This model's BalancedRouters carry {methods}: call attach(model) without a method, "
            f"or build them with {method!r}."
        )
    if len(methods) > 1:
        raise ValueError(
            f"One handle steps one method, but the routers carry {methods}: attach each kind by "
            'itself, for example attach(model, layers="*encoder*").'
        )
    balancing = Balancing(methods.pop(), balanced, group=group, plain=without_adapters)
    for name, router in named.items():
        if balanced.get(name or "router") is router:
            router.name = name or router.name
            balancing.on_detach(partial(_give_back, router, router.fused))
            router.at_rest = False
            _HANDLES[router] = weakref.ref(balancing)
            router.fused &= fused
        elif _handle_of(router) is None:
            router.at_rest = True
    reminder = StepReminder()
    balancing.on_step(reminder.saw_step)
    first = next(iter(balanced.values()))
    balancing.on_detach(first.register_forward_hook(partial(_remind, reminder)).remove)
    return balancing


def _handle_of(router: LayerBalance) -> Balancing | None:
    held = _HANDLES.get(router)
    return None if held is None else held()


def _give_back(router: LayerBalance, fused: bool) -> None:
    router.fused, router.at_rest = fused, True
    _HANDLES.pop(router, None)


def _remind(reminder: StepReminder, router: nn.Module, given: Any, output: Any) -> None:
    if router.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        reminder.saw_forward()
