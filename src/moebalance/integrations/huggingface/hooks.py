"""Tie balancing to a Transformers model: hooks on its routers, its decoder and its loss."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import __version__ as version
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.utils.generic import ModelOutput

from moebalance.core.distributed import Group
from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.integrations.huggingface.exporting import guard_saving
from moebalance.integrations.huggingface.routers import (
    Site,
    check_levers,
    find_sites,
    transformers_model,
)
from moebalance.methods.base import Method

logger = logging.getLogger("moebalance")


def serves(model: nn.Module) -> bool:
    """Whether this integration is the one for `model`: a Transformers model, or a wrapped one."""
    return transformers_model(model) is not None


def attach(
    model: nn.Module,
    method: Method,
    *,
    group: Group | None = None,
    keep_native_loss: bool = False,
    fused: bool = True,
) -> Balancing:
    """Balance every router of a Transformers model; see `moebalance.attach`."""
    inner = transformers_model(model)
    if inner is None:
        raise TypeError(f"{type(model).__name__} holds no Transformers model.")
    _refuse_second(model)
    _refuse_compiled(model)
    sites = find_sites(model)
    if not sites:
        raise ValueError(
            f"{type(inner).__name__} has no MoE router that could be found: no submodule whose "
            "class is named …Router or …Gate with `top_k` and a weight of one row an expert. Give "
            "a Mixture-of-Experts model, or write the layer with moebalance.BalancedRouter. Before "
            f"Transformers 5.6 many families have no router of their own; {version} is installed."
        )
    for site in sites:
        check_levers(site, method)

    layers = {}
    for site in sites:
        layer = LayerBalance(method, site.num_experts, gate=site.gate, fused=fused, name=site.name)
        layers[site.name] = layer.to(next(site.router.parameters()).device)
    balancing = Balancing(method, layers, group=group)
    try:
        _tie(balancing, model, inner, sites, keep_native_loss=keep_native_loss)
    except BaseException:
        balancing.detach()
        raise
    return balancing


def _tie(
    balancing: Balancing,
    model: nn.Module,
    inner: PreTrainedModel,
    sites: list[Site],
    *,
    keep_native_loss: bool,
) -> None:
    """Register every hook, and how to take it away again."""
    method, layers = balancing.method, balancing.layers
    if not keep_native_loss:
        balancing.on_detach(silence_native_loss(inner))
    forward, stacks = _Forward(), _stacks(inner)
    for site in sites:
        layer = layers[site.name]
        native = site.bias is not None and method.traits.has_selection_price
        number = _holder(stacks, site.router)
        reselect = method.traits.selects and not native
        hook = RouterHook(layer, site, forward, stack=number, reselect=reselect)
        balancing.on_detach(site.router.register_forward_hook(hook.after_router).remove)
        if site.bias is not None and native:
            original = site.bias.detach().clone()
            layer.adopt(-original.reshape(-1))
            balancing.on_step(partial(_publish_price, site, layer))
            balancing.on_detach(partial(_write_bias, site, original), restores_price=True)
        elif method.traits.has_selection_price:
            balancing.price_outside.add(site.name)
    balancing.on_detach(guard_saving(inner, balancing, sites))
    hooks = _ModelHooks(
        balancing,
        forward,
        sites,
        shifts_labels=_shifts_labels(inner),
        keep_native_loss=keep_native_loss,
    )
    for module in {id(m): m for m in (model, inner)}.values():
        before = module.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
        balancing.on_detach(before.remove)
        balancing.on_detach(module.register_forward_hook(hooks.after_model).remove)
    for number, stack in enumerate(stacks):
        see = partial(hooks.before_stack, number)
        balancing.on_detach(stack.register_forward_pre_hook(see, with_kwargs=True).remove)


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

    return partial(_restore_native_loss, silenced)


def _restore_native_loss(configs: list[Any]) -> None:
    for config in configs:
        config.output_router_logits = True


class _Layout(NamedTuple):
    """The tokens of one stack of layers: padding mask (T,) and number of sequences."""

    mask: Tensor | None = None
    sequences: int = 1


class _Context(NamedTuple):
    """One forward: the layout of each stack's tokens, and the batch's weight in its step."""

    layouts: tuple[_Layout, _Layout] = (_Layout(), _Layout())
    weight: Tensor | None = None


@dataclass
class _Forward:
    """The forward that routers are called for.

    Activation checkpointing calls them again in the backward pass; then it is the forward whose
    backward that is, which need not be the last one.
    """

    context: _Context = field(default_factory=_Context)

    def resume(self, context: _Context, gradient: Tensor) -> None:
        """Go back to the forward whose output now receives its gradient."""
        self.context = context


class RouterHook:
    """What happens after each call of one router.

    Args:
        layer: the layer's state.
        site: the router.
        forward: mask, layout and weight of the forward in progress.
        stack: which of the model's stacks the router belongs to.
        reselect: whether to choose the experts again under the price.
    """

    def __init__(
        self, layer: LayerBalance, site: Site, forward: _Forward, *, stack: int, reselect: bool
    ) -> None:
        self.layer, self.site, self.forward = layer, site, forward
        self.stack, self.reselect = stack, reselect

    def after_router(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Choose again if the method says so, and inject in training."""
        logits, carrier, experts = self.site.read(output)
        training = router.training and torch.is_grad_enabled()
        mask = self._mask(logits, strict=training)
        if self.reselect:
            preference = self.layer.preference(logits, mask, training=router.training)
            if preference is not None:
                experts = preference.topk(experts.shape[-1], dim=-1).indices
                carrier = self.site.weigh(logits, experts).to(carrier.dtype)
        if training:
            carrier = self.layer.tie(
                carrier,
                logits,
                experts,
                mask=mask,
                sequences=self.forward.context.layouts[self.stack].sequences,
                weight=self.forward.context.weight,
            )
        elif not router.training:
            self.layer.watch(logits, experts, mask=mask)
        return self.site.convention.write(output, carrier, experts)

    def _mask(self, logits: Tensor, *, strict: bool) -> Tensor | None:
        mask = self.forward.context.layouts[self.stack].mask
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

    def __init__(
        self,
        balancing: Balancing,
        forward: _Forward,
        sites: list[Site],
        *,
        shifts_labels: bool,
        keep_native_loss: bool,
    ) -> None:
        self.balancing, self.forward, self.sites = balancing, forward, sites
        self.shifts_labels, self.keep_native_loss = shifts_labels, keep_native_loss

    def before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not torch.compiler.is_compiling():
            # A model may have moved since; once compiled, it has found its place.
            weights = {s.name: next(s.router.parameters()) for s in self.sites}
            self.balancing.place({name: weight.device for name, weight in weights.items()})
        if model.training and torch.is_grad_enabled():
            self.forward.context = _Context(weight=self._weight_in_step(kwargs))
            if kwargs.get("output_router_logits") and not self.keep_native_loss:
                # Asked for by the caller, it would add the model's own balancing loss to ours.
                return args, {**kwargs, "output_router_logits": False}
        return None

    def before_stack(
        self, number: int, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if stack.training and not torch.is_grad_enabled():
            return  # a forward of the training model on the side, between the training forwards
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        # Masks of more axes say who sees whom, not which tokens are real.
        real = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            # A prefix or a cache makes the mask longer than what is routed, at its start.
            length = mask.shape[1] if tokens is None else tokens.shape[1]
            real = mask[:, -length:].reshape(-1).bool()
        layout = _Layout(real, 1 if tokens is None else tokens.shape[0])
        first, second = self.forward.context.layouts
        layouts = (layout, second) if number == 0 else (first, layout)
        self.forward.context = self.forward.context._replace(layouts=layouts)

    def after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        if not torch.compiler.is_compiling():
            # A trainer may make the loss from any of the outputs.
            values = output.values() if isinstance(output, ModelOutput) else output
            for value in values if not isinstance(values, Tensor | None) else (values,):
                if isinstance(value, Tensor) and value.requires_grad:
                    resume = partial(self.forward.resume, self.forward.context)
                    value.register_hook(resume)  # type: ignore[no-untyped-call]
        if isinstance(output, ModelOutput) and isinstance(output.get("loss"), Tensor):
            output["loss"] = self.balancing.follow(output["loss"])
            return output
        if isinstance(output, tuple) and isinstance(output[0], Tensor) and output[0].dim() == 0:
            return (self.balancing.follow(output[0]), *output[1:])
        return None

    def _weight_in_step(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        """This batch's share of its step's labels, where the trainer says how many there are."""
        total, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
        if total is None or labels is None:
            return None
        targets = kwargs.get("shift_labels")
        if targets is None:
            targets = labels[..., 1:] if self.shifts_labels else labels
        share: Tensor = (targets != -100).sum() / total
        return share


def _stacks(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose inputs are tokens with a padding mask: encoder and decoder, or one."""
    if getattr(model.config, "is_encoder_decoder", False):
        return [model.get_encoder(), model.get_decoder()]  # type: ignore[no-untyped-call]
    return [model.base_model]


def _holder(stacks: list[nn.Module], router: nn.Module) -> int:
    """Number of the stack that a router belongs to."""
    within = [any(module is router for module in stack.modules()) for stack in stacks]
    return within.index(True) if True in within else 0


def _publish_price(site: Site, layer: LayerBalance) -> None:
    price = layer.price
    if price is not None:
        _write_bias(site, -price)


def _write_bias(site: Site, value: Tensor) -> None:
    bias = site.bias
    if bias is not None:
        bias.data.copy_(value.view_as(bias))


def _shifts_labels(model: PreTrainedModel) -> bool:
    """Whether a Trainer counts this model's labels from the second on, as for causal models."""
    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return causal and not getattr(model.config, "is_encoder_decoder", False)


def _refuse_second(model: nn.Module) -> None:
    for name, module in model.named_modules():
        hooks = module._forward_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), RouterHook) for hook in hooks):
            raise ValueError(
                f"{name} is balanced already: detach() the first Balancing before attaching again."
            )


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{name or type(model).__name__} is compiled already, and a compiled model ignores "
                "hooks added later: attach first, then compile."
            )
