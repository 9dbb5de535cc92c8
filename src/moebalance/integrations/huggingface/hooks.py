"""Tie balancing to a Transformers model: hooks on its routers, its decoder and its loss."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from moebalance.balancers.base import Balancer
from moebalance.balancing import Balancing
from moebalance.integrations.huggingface.routers import (
    Site,
    check_levers,
    find_sites,
    transformers_model,
)
from moebalance.layer import LayerBalance

logger = logging.getLogger("moebalance")


def serves(model: nn.Module) -> bool:
    """Whether this integration is the one for `model`: a Transformers model, or a wrapped one."""
    return transformers_model(model) is not None


def attach(model: nn.Module, balancer: Balancer) -> Balancing:
    """Balance every router of a Transformers model; see `moebalance.attach`."""
    inner = transformers_model(model)
    assert inner is not None
    sites = find_sites(model)
    if not sites:
        raise ValueError(
            f"{type(inner).__name__} has no MoE router that could be found: no submodule whose "
            "class is named …Router or …Gate with `top_k` and a weight of one row an expert. Give "
            "a Mixture-of-Experts model, or write the layer with moebalance.BalancedRouter."
        )
    _refuse_second(sites)
    _refuse_compiled(model)
    for site in sites:
        check_levers(site, balancer)

    layers = {}
    for site in sites:
        layer = LayerBalance(balancer, site.num_experts, gate=site.rule.gate, name=site.name)
        layers[site.name] = layer.to(next(site.router.parameters()).device)
    balancing = Balancing(balancer, layers)
    balancing.on_detach(silence_native_loss(inner))

    forward = _Forward()
    for site in sites:
        layer = layers[site.name]
        native = site.bias is not None and balancer.prices_selection
        hook = RouterHook(layer, site, forward, reselect=balancer.selects and not native)
        balancing.on_detach(site.router.register_forward_hook(hook.after_router).remove)
        if site.bias is not None and native:
            bias = site.bias.detach()
            layer.adopt(-bias.reshape(-1))
            balancing.on_step(partial(_write_bias, bias, layer))
            balancing.on_detach(partial(_restore, bias, bias.clone()))
    hooks = _ModelHooks(balancing, forward, sites)
    for module in {id(m): m for m in (model, inner)}.values():
        before = module.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
        balancing.on_detach(before.remove)
        balancing.on_detach(module.register_forward_hook(hooks.after_model).remove)
    decoder = inner.base_model
    before = decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True)
    balancing.on_detach(before.remove)
    return balancing


def silence_native_loss(model: PreTrainedModel) -> Callable[[], None]:
    """Switch off a model's own balancing loss, which would be added to ours; return the undo."""
    silenced = []
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
            silenced.append(config)
            logger.warning(
                "moebalance: switched off %s's own balancing loss (output_router_logits=True, "
                "router_aux_loss_coef=%s); detach() switches it on again.",
                type(model).__name__,
                getattr(config, "router_aux_loss_coef", None),
            )

    def undo() -> None:
        for config in silenced:
            config.output_router_logits = True

    return undo


@dataclass
class _Forward:
    """What the model's hooks hand to its routers' hooks during one forward."""

    mask: Tensor | None = None
    sequences: int = 1
    weight: Tensor | None = None


class RouterHook:
    """What happens after each call of one router.

    Args:
        layer: the layer's state.
        site: the router.
        forward: mask, layout and weight of the forward in progress.
        reselect: whether to choose the experts again under the price.
    """

    def __init__(
        self, layer: LayerBalance, site: Site, forward: _Forward, *, reselect: bool
    ) -> None:
        self.layer, self.rule, self.forward, self.reselect = layer, site.rule, forward, reselect

    def after_router(
        self, router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Choose again if the method says so, and inject in training."""
        logits, weights, experts, *rest = output
        training = router.training and torch.is_grad_enabled()
        mask = self._mask(logits, strict=training) if router.training else None
        if self.reselect:
            preference = self.layer.preference(logits, mask, training=router.training)
            if preference is not None:
                experts = preference.topk(experts.shape[-1], dim=-1).indices
                weights = self.rule.weigh(logits, experts).to(weights.dtype)
        if training:
            weights = self.layer.inject(
                weights,
                logits,
                experts,
                mask=mask,
                sequences=self.forward.sequences,
                weight=self.forward.weight,
            )
        return (logits, weights, experts, *rest)

    def _mask(self, logits: Tensor, *, strict: bool) -> Tensor | None:
        mask = self.forward.mask
        if mask is not None and mask.shape[0] != logits.shape[0]:
            if not strict:  # generation between training steps: nothing is counted there
                return None
            raise ValueError(
                f"{self.layer.name} saw {logits.shape[0]} tokens under an attention mask for "
                f"{mask.shape[0]}: moebalance needs a mask (batch, sequence) of the very tokens "
                "that are routed, to leave padding out of the statistics."
            )
        return mask


class _ModelHooks:
    """Hand the padding mask and the batch's weight to the routers, and follow the model's loss."""

    def __init__(self, balancing: Balancing, forward: _Forward, sites: list[Site]) -> None:
        self.balancing, self.forward, self.sites = balancing, forward, sites

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            # A model may have moved since; once compiled, it has found its place.
            weights = {s.name: next(s.router.parameters()) for s in self.sites}
            self.balancing.place({name: weight.device for name, weight in weights.items()})
        if model.training and torch.is_grad_enabled():
            self.forward.weight = _weight_in_step(kwargs)

    def before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not (decoder.training and torch.is_grad_enabled()):
            return
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds", args[0] if args else None)
        self.forward.sequences = 1 if tokens is None else tokens.shape[0]
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        # Masks of more axes say who sees whom, not which tokens are real.
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.forward.mask = mask.reshape(-1).bool()
        else:
            self.forward.mask = None

    def after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        if isinstance(output, ModelOutput) and isinstance(output.get("loss"), Tensor):
            output["loss"] = self.balancing.follow(output["loss"])
            return output
        return None


def _write_bias(bias: Tensor, layer: LayerBalance) -> None:
    """Set a model's own selection bias to −price."""
    price = layer.price
    assert price is not None
    bias.copy_(-price.view_as(bias))


def _restore(bias: Tensor, original: Tensor) -> None:
    bias.copy_(original)


def _refuse_second(sites: list[Site]) -> None:
    for site in sites:
        hooks = site.router._forward_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), RouterHook) for hook in hooks):
            raise ValueError(
                f"{site.name} is balanced already: detach() the first Balancing before attaching "
                "again."
            )


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{name or type(model).__name__} is compiled already, and a compiled model ignores "
                "hooks added later: attach first, then compile."
            )


def _weight_in_step(kwargs: Mapping[str, Any]) -> Tensor | None:
    """This batch's share of the labels of its step, where the trainer says how many there are."""
    total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if total is None or labels is None:
        return None
    shifted = kwargs.get("shift_labels")
    targets = labels[..., 1:] if shifted is None else shifted
    share: Tensor = (targets != -100).sum() / total
    return share
