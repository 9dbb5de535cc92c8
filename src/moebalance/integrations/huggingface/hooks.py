"""Tie balancing to a Transformers model: hooks on its routers and on the models around them."""

from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moebalance.core.distributed import Group
from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.integrations.compiled import refuse_compiled
from moebalance.integrations.copies import release
from moebalance.integrations.huggingface.choice import choose_sites
from moebalance.integrations.huggingface.exporting import guard_saving
from moebalance.integrations.huggingface.forward import Context, Forward, find_entrances, holder
from moebalance.integrations.huggingface.model_hooks import ModelHooks
from moebalance.integrations.huggingface.native_loss import silence_native_loss
from moebalance.integrations.huggingface.price import BiasPrice, Policy, Prices
from moebalance.integrations.huggingface.release import hint
from moebalance.integrations.huggingface.router_hook import RouterHook
from moebalance.integrations.huggingface.routers import Site, transformers_model
from moebalance.integrations.huggingface.storage import home
from moebalance.integrations.huggingface.tokens import Layout
from moebalance.integrations.names import Layers, without_adapters
from moebalance.methods.base import Method, sees_sequences


def serves(model: nn.Module) -> bool:
    """Whether this integration is the one for `model`: a Transformers model, or a wrapped one."""
    return transformers_model(model) is not None


def attach(
    model: nn.Module,
    method: Method | None = None,
    *,
    layers: Layers | None = None,
    group: Group | None = None,
    keep_native_loss: bool = False,
    fused: bool = True,
) -> Balancing:
    """Balance the routers of a Transformers model; see `moebalance.attach`."""
    inner = transformers_model(model)
    if inner is None:
        raise TypeError(
            f"{type(model).__name__} holds no Transformers model. Call moebalance.attach(model, …) "
            "by yourself, with routers=… for plain gates, and give what it returns."
        )
    release(model)
    _refuse_second(model)
    refuse_compiled(model)
    sites, method = choose_sites(model, method, layers)
    if not sites:
        raise ValueError(
            f"{type(inner).__name__} has no MoE router that could be found: no submodule whose "
            "class is named …Router or …Gate with `top_k` and a weight of one row an expert. Give "
            "a Mixture-of-Experts model; or, if its routers are plain modules such as nn.Linear, "
            'name them: attach(model, method, routers="*.gate", top_k=2, mask="attention_mask"); '
            f"or write the layer with moebalance.BalancedRouter.{hint()}"
        )
    balanced = {site.name: _layer(site, method, fused=fused) for site in sites}
    balancing = Balancing(method, balanced, group=group, plain=without_adapters)
    try:
        _tie(balancing, model, sites, group, keep_native_loss=keep_native_loss)
    except BaseException:
        balancing.detach()
        raise
    return balancing


def hooks_of(model: nn.Module) -> list[ModelHooks]:
    """The hooks that `attach` put on a model."""
    owners = [
        getattr(hook, "func", hook) for m in model.modules() for hook in m._forward_hooks.values()
    ]
    found = [getattr(owner, "__self__", None) for owner in owners]
    return list({id(each): each for each in found if isinstance(each, ModelHooks)}.values())


def _layer(site: Site, method: Method, *, fused: bool) -> LayerBalance:
    """State on the device of its router; of a router on meta it waits where values can be kept."""
    layer = LayerBalance(method, site.num_experts, gate=site.gate, fused=fused, name=site.name)
    device = home(site.router)
    return layer if device is None else layer.to(device)


def _tie(
    balancing: Balancing,
    model: nn.Module,
    sites: list[Site],
    group: Group | None,
    *,
    keep_native_loss: bool,
) -> None:
    """Register every hook, and how to take it away again."""
    method = balancing.method
    if not keep_native_loss:
        for inner in _models(model, sites):
            balancing.on_detach(silence_native_loss(inner))
    entrances = find_entrances(model, [site.router for site in sites])
    stacks = sum(entrance.stack is not None for entrance in entrances)
    forward = Forward(Context((Layout(),) * stacks))
    by_sequence = sees_sequences(method)
    hooks, carried = [], []
    for site in sites:
        layer = balancing.layers[site.name]
        native = site.bias is not None and method.traits.has_selection_price
        hook = RouterHook(
            layer,
            site,
            forward,
            stack=holder(entrances, site.router),
            reselect=method.traits.selects and not native,
            by_sequence=by_sequence,
            place=balancing.place,
        )
        hooks.append(hook)
        balancing.on_detach(site.router.register_forward_hook(hook.after_router).remove)
        balancing.on_detach(hook.stand_in())
        if native:
            carried.append(BiasPrice(site, layer))
        elif layer.trains_price:
            balancing.price_outside.add(site.name)
    prices = Prices(carried, group)
    balancing.on_step(prices.publish)
    balancing.on_step(prices.compare)
    balancing.on_detach(prices.restore, restores_price=True)
    for inner in _models(model, sites):
        balancing.on_detach(guard_saving(inner, balancing, sites))
    around = ModelHooks(
        balancing,
        forward,
        entrances,
        hooks,
        prices=prices,
        policy=Policy(model),
        packed=by_sequence,
        keep_native_loss=keep_native_loss,
    )
    balancing.on_step(around.steps.saw_step)
    for entrance in entrances:
        before: Any = partial(around.before, entrance)
        after: Any = partial(around.after, entrance)
        module = entrance.module
        balancing.on_detach(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        balancing.on_detach(module.register_forward_hook(after).remove)


def _models(model: nn.Module, sites: list[Site]) -> list[PreTrainedModel]:
    """The outermost Transformers models that hold these routers."""
    wanted = {id(site.router) for site in sites}
    found: list[PreTrainedModel] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            nested = any(module is inner for outer in found for inner in outer.modules())
            if not nested and any(id(inner) in wanted for inner in module.modules()):
                found.append(module)
    return found


def _refuse_second(model: nn.Module) -> None:
    for name, module in model.named_modules():
        hooks = module._forward_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), RouterHook) for hook in hooks):
            raise ValueError(
                f"{name} is balanced already: detach() the first Balancing before attaching again, "
                "or give it to monitor() to watch it."
            )
