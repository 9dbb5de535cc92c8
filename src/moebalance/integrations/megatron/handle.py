"""Collect a model's balanced routers into one handle, and end its steps where Megatron does."""

import logging
from typing import Any

from megatron.core import parallel_state  # type: ignore[import-not-found]
from megatron.core.transformer.moe.router import TopKRouter  # type: ignore[import-not-found]
from megatron.core.utils import get_model_config  # type: ignore[import-not-found]
from torch import nn

from moebalance.core.handle import Balancing
from moebalance.integrations.megatron import packed
from moebalance.integrations.megatron.router import BalancedTopKRouter
from moebalance.methods import NoBalancing
from moebalance.methods.base import refuse_frozen

logger = logging.getLogger("moebalance")


def attach(model: nn.Module | list[nn.Module], *, step_by_hand: bool = False) -> Balancing:
    """Collect a model's balanced routers; from now on Megatron's training steps are theirs.

    A step ends when Megatron finalises the gradients, just before its optimizer's step. Either
    `config.finalize_model_grads_func` is set before this call, which wraps it; or it is set later,
    as Megatron-LM's `pretrain` does, and the configuration's `moe_router_load_balancing_type` is
    "global_aux_loss" with coefficient 0, so that Megatron calls the routers itself.

    Args:
        model: the model, wrapped or not, or the list of its pipeline chunks on this rank.
        step_by_hand: end no step; call `balancing.step()` after each optimizer step.

    Returns:
        The handle: `metrics()`, `loads()`, `detach()`. The state is in the model's checkpoint.

    Raises:
        ValueError: no balanced router, a plain TopKRouter among them, different methods, a frozen
            router under a method that needs its gradient, or a model that is attached already.
    """
    chunks = model if isinstance(model, list) else [model]
    config = get_model_config(chunks[0])
    routers = _routers(chunks)
    if not routers:
        return _dense_stage(chunks[0], config)
    method = _one_method(routers)
    for name, router in routers.items():
        _check(name, router)
        router.balance.name = name
    first = next(iter(routers.values()))
    layers = {name: router.balance for name, router in routers.items()}
    balancing = Balancing(method, layers, group=first.tp_dp_cp_group)
    boundary = _Boundary(balancing, config, first, by_hand=step_by_hand)
    for name, router in routers.items():
        router.check_stepped, router.on_reset = boundary.check, boundary.reset
        balancing.on_step(router.publish_price)
        held = method.traits.has_selection_price and router.expert_bias is not None
        if router.balance.trains_price and not held:
            balancing.price_outside.add(name)
    if first.balance.by_sequence:
        for remove in packed.follow(chunks, routers.values()):
            balancing.on_detach(remove)
    balancing.on_detach(boundary.remove)
    balancing.on_detach(lambda: _let_go(routers))
    return balancing


def _dense_stage(chunk: nn.Module, config: Any) -> Balancing:
    """The handle of a pipeline stage without experts: nothing to count, nobody to wait for."""
    if config.pipeline_model_parallel_size == 1 or not config.num_moe_experts:
        raise ValueError(
            f"{type(chunk).__name__} has no BalancedTopKRouter: set num_moe_experts in its "
            "configuration, and build it from balanced_spec(spec, method)."
        )
    logger.info("moebalance: no MoE layer on this pipeline stage.")
    # Its own group: over the default one it would wait for stages that sum among themselves.
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return Balancing(NoBalancing(), {}, group=group)


class _Boundary:
    """Where one optimizer step ends and the next begins, told by Megatron in one of two ways.

    Args:
        balancing: what to step.
        config: the configuration that the training schedule reads.
        first: the router whose reset stands for all: Megatron resets one after the other.
        by_hand: the user steps.
    """

    def __init__(
        self, balancing: Balancing, config: Any, first: BalancedTopKRouter, *, by_hand: bool
    ) -> None:
        self.balancing, self.config, self.first, self.by_hand = balancing, config, first, by_hand
        self.finalizing = False
        self.inner: Any = config.finalize_model_grads_func
        if self.inner is not None and not by_hand:
            config.finalize_model_grads_func = self.finalize

    def finalize(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's own function, then the end of the step."""
        # Begun first, the one message of a step travels while Megatron reduces gradients.
        self.balancing.reduce()
        self.finalizing = True
        try:
            result = self.inner(*args, **kwargs)
        finally:
            self.finalizing = False
        self.balancing.step()
        return result

    def reset(self, router: BalancedTopKRouter) -> None:
        """A router was told that the step is over."""
        if router is self.first and not self.finalizing and not self.by_hand:
            self.balancing.step()

    def check(self) -> None:
        """Refuse to train when no step would ever end.

        Raises:
            RuntimeError: `finalize_model_grads_func` was replaced, or never set.
        """
        wrapped = self.config.finalize_model_grads_func == self.finalize
        if wrapped or self.by_hand or "global_aux_loss" in self.first.routing_type:
            return
        raise RuntimeError(
            "Nothing ends the steps of the balanced routers: config.finalize_model_grads_func was "
            f"{self.config.finalize_model_grads_func!r} when training began. Attach after it is "
            "set; or, where the training loop sets it (Megatron-LM's pretrain), configure "
            'moe_router_load_balancing_type="global_aux_loss" with moe_aux_loss_coeff=0; or '
            "attach(model, step_by_hand=True) and call step() after each optimizer step."
        )

    def remove(self) -> None:
        """Give Megatron its function back."""
        if self.config.finalize_model_grads_func == self.finalize:
            self.config.finalize_model_grads_func = self.inner


def _routers(chunks: list[nn.Module]) -> dict[str, BalancedTopKRouter]:
    """All routers by name, the chunk's number first where there are several."""
    found = {}
    for number, chunk in enumerate(chunks):
        prefix = f"chunk{number}." if len(chunks) > 1 else ""
        for name, module in chunk.named_modules():
            if isinstance(module, TopKRouter):
                found[prefix + _unwrapped(name)] = module
    plain = [name for name, router in found.items() if not isinstance(router, BalancedTopKRouter)]
    if plain:
        raise ValueError(
            f"{plain[0]} ({len(plain)} of {len(found)} routers) is a plain TopKRouter: build the "
            "model from balanced_spec(spec, method), for every MoE layer."
        )
    return found


def _unwrapped(name: str) -> str:
    """A module's name without the names of the wrappers around the model."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _one_method(routers: dict[str, BalancedTopKRouter]) -> Any:
    methods = {router.balance.method for router in routers.values()}
    if len(methods) > 1:
        raise ValueError(f"One handle steps one method, but the routers carry {methods}.")
    return methods.pop()


def _check(name: str, router: BalancedTopKRouter) -> None:
    if router.check_stepped is not None:
        raise ValueError(f"{name} is attached already: detach() the first Balancing before.")
    refuse_frozen(name, router.balance.method, trains=router.weight.requires_grad)


def _let_go(routers: dict[str, BalancedTopKRouter]) -> None:
    for router in routers.values():
        router.check_stepped = router.on_reset = None
