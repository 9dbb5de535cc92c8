"""DeepSpeed AutoEP: balance the routers that it puts into a Transformers model.

    engine, *_ = deepspeed.initialize(model=model, config=config)     # "expert_parallel" in config
    balancing = deepspeed_autoep.attach(engine.module, mb.PhiBalancing())
    for batch in batches:
        last = engine.is_gradient_accumulation_boundary()
        engine.backward(balancing.follow(engine(**batch).loss))
        engine.step()
        if last:
            balancing.step()

AutoEP replaces the model's MoE blocks, so attach after it; `moebalance.attach` is for the blocks
that it replaces. It refuses `load_balance_coeff`: loss-free balancing is what this adds. Tokens are
counted padding included, for AutoEP does not tell a router which those are. Written for DeepSpeed
0.19.8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter  # type: ignore[import-not-found]
from jaxtyping import Float
from torch import Tensor, nn

from moebalance.core.distributed import Group
from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.gates import Gate, Sigmoid, Softmax
from moebalance.integrations.copies import Hook, release
from moebalance.methods.base import Method, refuse_frozen

_GATES: dict[str, Gate] = {"softmax": Softmax(), "sigmoid": Sigmoid()}
_BIAS = "e_score_correction_bias"


def attach(model: nn.Module, method: Method, *, group: Group | None = None) -> Balancing:
    """Balance every router that AutoEP made.

    A selection price is kept as -price in the router's `e_score_correction_bias`, which AutoEP adds
    before its top-k; groups of experts are limited as ever. A router without one gets one until
    `detach`.

    Args:
        model: the model after `deepspeed.initialize`, such as `engine.module`.
        method: the method. One that chooses experts by itself, such as Sinkhorn, is refused.
        group: the ranks that hold these layers and disjoint tokens; None for all ranks.

    Returns:
        The handle: `follow(loss)` before `engine.backward`, and `step()` after the engine's step at
        an accumulation boundary.

    Raises:
        ValueError: no router of AutoEP's, one that is balanced already, or frozen under a method
            that needs its gradient; or a method that chooses experts without a price.
    """
    routers = {n: m for n, m in model.named_modules() if isinstance(m, TokenChoiceTopKRouter)}
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no router of AutoEP's: attach after "
            "deepspeed.initialize with expert_parallel.enabled. A model that AutoEP leaves alone "
            "goes to moebalance.attach."
        )
    _check_method(method)
    release(model)
    layers = {}
    for name, router in routers.items():
        _check(name, router, method)
        layer = LayerBalance(method, router.num_experts, gate=_GATES[router.score_func], name=name)
        layers[name] = layer.to(router.gate.weight.device)
    balancing = Balancing(method, layers, group=group)
    for name, router in routers.items():
        hooks = _Hooks(layers[name])
        balancing.on_detach(router.gate.register_forward_hook(hooks.after_gate).remove)
        balancing.on_detach(router.register_forward_hook(hooks.after_router).remove)
        if method.traits.has_selection_price:
            _own_bias(balancing, router, layers[name])
    return balancing


class _Hooks(Hook):
    """See one router's logits, and tie counting and charge to its weights.

    Args:
        layer: the layer's state.
    """

    def __init__(self, layer: LayerBalance) -> None:
        self.layer = layer
        self.logits: Float[Tensor, "T E"]

    def after_gate(self, gate: nn.Module, args: Any, logits: Float[Tensor, "T E"]) -> None:
        """Remember the logits."""
        self.logits = logits

    def after_router(self, router: nn.Module, args: Any, output: Any) -> Any:
        """Count and charge in training; the choice is AutoEP's."""
        weights, experts, counts = output
        if router.training and torch.is_grad_enabled() and not self.at_rest:
            weights = self.layer.tie(weights, self.logits, experts)
        elif not router.training:
            self.layer.watch(self.logits, experts)
        return weights, experts, counts


def _own_bias(balancing: Balancing, router: Any, layer: LayerBalance) -> None:
    """Write the price into the router's bias, from now on and after each step."""
    bias = getattr(router, _BIAS)
    if bias is None:
        setattr(router, _BIAS, torch.zeros_like(layer.running[: layer.num_experts]))
        balancing.price_outside.add(layer.name)
        balancing.on_detach(partial(setattr, router, _BIAS, None))
    else:
        original = bias.detach().clone()
        layer.adopt(-original)
        balancing.on_detach(partial(_write, router, original), restores_price=True)
    balancing.on_step(partial(_publish, router, layer))


@torch.no_grad()
def _write(router: Any, value: Tensor) -> None:
    getattr(router, _BIAS).copy_(value)


def _publish(router: Any, layer: LayerBalance) -> None:
    price = layer.price
    if price is not None:
        _write(router, -price)


def _check_method(method: Method) -> None:
    if method.traits.selects and not method.traits.has_selection_price:
        raise ValueError(
            f"{method!r} chooses experts by itself, and an AutoEP router counts and limits its own "
            'choice. Take a price on the affinities (scale="affinity"), for example LossFree(), or '
            "a method that works through the loss, such as PhiBalancing."
        )


def _check(name: str, router: Any, method: Method) -> None:
    if router.score_func not in _GATES:
        raise ValueError(
            f"{name}: score_func={router.score_func!r} is not known here: must be one of "
            f"{sorted(_GATES)}."
        )
    hooks = router._forward_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), _Hooks) for hook in hooks):
        raise ValueError(f"{name} is balanced already: detach() the first Balancing before.")
    refuse_frozen(name, method, trains=router.gate.weight.requires_grad)
