"""Transformers: find the routers of a model, tie the balancing to them, and follow its Trainer.

Routers are left as they are. A forward hook on each one puts the injecting node on its weights and,
where the family has no selection bias of its own, chooses again under the price. Where it has one
(`e_score_correction_bias` and its kin), −price is written there and leaves with `save_pretrained`.
Hooks on the model hand over the padding mask and follow the gradient of its loss.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import ModelOutput

from moebalance.balancers.base import Balancer
from moebalance.balancing import Balancing
from moebalance.layer import LayerBalance
from moebalance.sites import Rule, recognise

logger = logging.getLogger("moebalance")

STATE_FILE = "moebalance.safetensors"
"""Name of the balancing state beside a checkpoint's own files."""

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
    bias: Tensor | None


@dataclass
class _Forward:
    """What the model's hooks hand to its routers' hooks during one forward."""

    mask: Tensor | None = None
    sequences: int = 1
    weight: Tensor | None = None


def serves(model: nn.Module) -> bool:
    """Whether this integration is the one for `model`: a Transformers model, or a wrapped one."""
    return _transformers_model(model) is not None


def attach(model: nn.Module, balancer: Balancer) -> Balancing:
    """Balance every router of a Transformers model; see `moebalance.attach`."""
    inner = _transformers_model(model)
    assert inner is not None
    _refuse_compiled(model)
    sites = find_sites(model)
    if not sites:
        raise ValueError(
            f"{type(inner).__name__} has no MoE router that could be found: no submodule whose "
            "class is named …Router or …Gate with `top_k` and a weight of one row an expert. Give "
            "a Mixture-of-Experts model, or write the layer with moebalance.BalancedRouter."
        )
    for site in sites:
        _check_levers(site, balancer)

    undo: list[Callable[[], None]] = []
    layers: dict[str, LayerBalance] = {}
    forward = _Forward()
    publish: list[Callable[[], None]] = []
    undo.extend(_silence_native_loss(inner))
    for site in sites:
        layer = LayerBalance(balancer, site.num_experts, gate=site.rule.gate, name=site.name)
        layer.to(next(site.router.parameters()).device)
        layers[site.name] = layer
        native = site.bias is not None and balancer.prices_selection
        hook = RouterHook(layer, site, forward, reselect=balancer.selects and not native)
        undo.append(site.router.register_forward_hook(hook.after_router).remove)
        if native:
            bias = cast(Tensor, site.bias)
            original = bias.detach().clone()
            publish.append(lambda b=bias, o=original, la=layer: _write_bias(b, o, la.price))
            undo.append(lambda b=bias, o=original: _write_bias(b, o, None))

    balancing = Balancing(balancer, layers, after_step=publish, on_detach=undo)
    hooks = _ModelHooks(balancing, forward)
    for module in {id(m): m for m in (model, inner)}.values():
        undo.append(module.register_forward_pre_hook(hooks.before_model, with_kwargs=True).remove)
        undo.append(module.register_forward_hook(hooks.after_model).remove)
    decoder = inner.base_model
    undo.append(decoder.register_forward_pre_hook(hooks.before_decoder, with_kwargs=True).remove)
    balancing._on_detach = undo
    return balancing


def find_sites(model: nn.Module) -> list[Site]:
    """Find and recognise every MoE router of a model.

    Raises:
        ValueError: a router whose rule is unknown, or that is balanced already.
    """
    sites = []
    for name, module in model.named_modules():
        if not _looks_like_router(module) or "original_module" in name.split("."):
            continue
        if any(isinstance(_owner(h), RouterHook) for h in module._forward_hooks.values()):
            raise ValueError(
                f"{name} is balanced already: detach() the first Balancing before attaching again."
            )
        weight = cast(Tensor, module.weight)
        num_experts, top_k = weight.shape[0], cast(int, module.top_k)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{name} sends each token to {top_k} of {num_experts} experts: top_k must lie in "
                "1..num_experts; mend the model's configuration."
            )
        rule = _probe(name, module)
        sites.append(Site(name, module, num_experts, top_k, rule, _native_bias(module)))
    return sites


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
        mask = self._mask(logits) if router.training else None
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

    def _mask(self, logits: Tensor) -> Tensor | None:
        mask = self.forward.mask
        if mask is not None and mask.shape[0] != logits.shape[0]:
            raise ValueError(
                f"{self.layer.name} saw {logits.shape[0]} tokens under an attention mask for "
                f"{mask.shape[0]}: moebalance needs a mask (batch, sequence) of the very tokens "
                "that are routed, to leave padding out of the statistics."
            )
        return mask


class _ModelHooks:
    """Hand the padding mask and the batch's weight to the routers, and follow the model's loss."""

    def __init__(self, balancing: Balancing, forward: _Forward) -> None:
        self.balancing, self.forward = balancing, forward

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
        flat = isinstance(mask, Tensor) and mask.dim() == 2
        self.forward.mask = mask.reshape(-1).bool() if flat else None

    def after_model(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        if isinstance(output, ModelOutput) and isinstance(output.get("loss"), Tensor):
            output["loss"] = self.balancing.follow(output["loss"])
            return output
        return None


class BalanceCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Let a Hugging Face Trainer (or TRL's) drive the balancing.

    Ends the balancing step with the optimizer step, adds the metrics to the trainer's logs, saves
    the state beside each checkpoint and takes it up again on resuming.

    Args:
        balancing: what `moebalance.attach` returned.
        prefix: put before each metric's name in the logs.
        resume_from: folder of the checkpoint to resume from; found by itself where the checkpoint
            lies in the trainer's own output folder.
    """

    def __init__(
        self, balancing: Balancing, *, prefix: str = "moe/", resume_from: str | Path | None = None
    ) -> None:
        self.balancing, self.prefix = balancing, prefix
        self.resume_from = None if resume_from is None else Path(resume_from)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the scale for losses made by the trainer, and resume if the trainer does."""
        model = _transformers_model(kwargs["model"])
        if model is not None:
            _silence_native_loss(model)
        self.balancing.set_loss_scale(1 / args.gradient_accumulation_steps)
        if state.global_step == self.balancing.steps:
            return
        folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        load(self.balancing, folder)
        if state.global_step != self.balancing.steps:
            raise ValueError(
                f"{folder / STATE_FILE} was saved after {self.balancing.steps} steps, but training "
                f"resumes at step {state.global_step}: give the checkpoint that is resumed from as "
                "BalanceCallback(..., resume_from=...)."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the balancing step."""
        self.balancing.step()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the metrics to a training log entry."""
        if logs is None or "loss" not in logs:
            return
        found = {self.prefix + name: value for name, value in self.balancing.metrics().items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state beside the checkpoint just written."""
        if state.is_world_process_zero:
            save(self.balancing, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def lead(self, trainer: Any) -> None:
        """Move this callback to the front, so that W&B, TensorBoard and others log the metrics too.

        A Trainer calls its reporters before the callbacks it is given.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)


def save(balancing: Balancing, folder: str | Path) -> Path:
    """Write the balancing state into a checkpoint folder, whole or not at all."""
    state = balancing.state_dict()
    tensors = {
        f"{name}/{key}": tensor.cpu().contiguous()
        for name, layer in state.pop("layers").items()
        for key, tensor in layer.items()
    }
    path = Path(folder) / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"moebalance": json.dumps(state)})
    os.replace(partial, path)
    return path


def load(balancing: Balancing, folder: str | Path) -> None:
    """Take up the balancing state that `save` wrote into a checkpoint folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, foreign, or does not fit.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"No balancing state at {path}: this checkpoint was saved without a BalanceCallback, "
            "or lies elsewhere; then give its folder as BalanceCallback(..., resume_from=...)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("moebalance")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): resume from an earlier checkpoint."
        ) from error
    if metadata is None:
        raise ValueError(f"{path} was not written by moebalance: it carries no description.")
    state = json.loads(metadata)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition("/")
        layers.setdefault(name, {})[leaf] = tensor
    balancing.load_state_dict({**state, "layers": layers})


def _transformers_model(model: nn.Module) -> PreTrainedModel | None:
    """The Transformers model in `model`, which may be wrapped (PEFT, DDP)."""
    found = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next(found, None)


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


def _native_bias(router: nn.Module) -> Tensor | None:
    tensors = [*router.named_buffers(), *router.named_parameters()]
    return next((t for name, t in tensors if name.rpartition(".")[2] in _NATIVE_BIAS), None)


def _write_bias(bias: Tensor, original: Tensor, price: Tensor | None) -> None:
    with torch.no_grad():
        value = (
            original if price is None else original - price.to(original.device).view_as(original)
        )
        bias.copy_(value)


def _check_levers(site: Site, balancer: Balancer) -> None:
    native = balancer.prices_selection and site.bias is not None
    if balancer.selects and not native and not site.rule.plain_top_k:
        raise ValueError(
            f"{balancer!r} chooses experts, but {site.name} ({type(site.router).__name__}) limits "
            "the choice by groups and has no selection bias for it: use a loss-lever method such "
            "as PhiBalancing."
        )
    if balancer.charges and not any(p.requires_grad for p in site.router.parameters()):
        raise ValueError(
            f"{balancer!r} works through the gradient of the router, but {site.name} is frozen. "
            "Train it (with PEFT: modules_to_save or target_parameters), or use a selection-lever "
            "method such as LossFree."
        )


def _silence_native_loss(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Switch off a model's own balancing loss, which would be added to ours; return the undo."""
    undo: list[Callable[[], None]] = []
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
            logger.warning(
                "moebalance: switched off %s's own balancing loss (output_router_logits=True, "
                "router_aux_loss_coef=%s); detach() switches it on again.",
                type(model).__name__,
                getattr(config, "router_aux_loss_coef", None),
            )
            undo.append(lambda c=config: setattr(c, "output_router_logits", True))
    return undo


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
    return (targets != -100).sum() / total


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)
