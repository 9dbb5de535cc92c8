"""Drive the balancing of a built torchtitan model from its optimizer.

Called by torchtitan once, after the optimizers are built. From then on the one message of a step is
sent before the optimizer's step and its answer taken in after it.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moebalance.core.distributed import Group
from moebalance.core.handle import Balancing
from moebalance.core.state import bare_name
from moebalance.integrations.torchtitan.router import BalancedTopKRouter, RouterBalance, local
from moebalance.methods.base import Method, refuse_frozen


def drive(
    optimizers: Any, model_parts: Sequence[nn.Module], parallel_dims: Any, *, method: Method
) -> Balancing | None:
    """Step the balancing with the optimizers; what a `post_optimizer_build_fn` does.

    The handle becomes `optimizers.balancing`. torchtitan's own rule is switched off on every layer
    (`load_balance_coeff` becomes None), so that a hook that registers it later finds nothing to do.

    Args:
        optimizers: torchtitan's `OptimizersContainer`.
        model_parts: the stages of the model that this rank holds.
        parallel_dims: torchtitan's `ParallelDims`.
        method: the method that the routers were built with.

    Returns:
        The handle; None on a pipeline stage without MoE layers, which has nothing to step.

    Raises:
        RuntimeError: without pipeline stages, no router of ours is in the model.
        ValueError: a router is frozen under a method that needs its gradient.
    """
    # First, and on every rank: stages without MoE layers take part in making groups.
    group = disjoint_tokens(parallel_dims)
    owners = _owners(model_parts)
    if not owners:
        if parallel_dims.pp_enabled:
            return None
        raise RuntimeError(
            "No balanced router is in this model, though its configuration had some: something "
            "has replaced them after balanced(). Call balanced() last."
        )
    for name, owner in owners.items():
        gate = owner.router.gate.parameters()
        refuse_frozen(name, method, trains=any(weight.requires_grad for weight in gate))
        owner.router.balance.name = name
        owner.load_balance_coeff = None

    layers = {name: owner.router.balance for name, owner in owners.items()}
    balancing = Balancing(method, layers, group=group)
    if method.traits.has_selection_price:
        for owner in owners.values():
            owner.register_load_state_dict_post_hook(_adopt)
        balancing.on_step(partial(_publish, list(owners.values())))
    balancing.on_step(partial(_clear_counters, list(owners.values())))
    optimizers.balancing = balancing
    optimizers.register_step_pre_hook(lambda *_: balancing.reduce())
    optimizers.register_step_post_hook(lambda *_: balancing.step())
    return balancing


def disjoint_tokens(parallel_dims: Any) -> Group:
    """The ranks that hold the same layers as this one and other tokens.

    Those of data and context parallelism within a pipeline stage; with expert parallelism those of
    tensor parallelism too, among which torchtitan then shards the sequence.
    """
    sharded = parallel_dims.tp > 1 and parallel_dims.ep_enabled
    if sharded:
        axes = [a for a in ("batch", "cp") if parallel_dims.get_optional_mesh(a) is not None]
        mesh = parallel_dims.get_mesh([*axes, "tp"])
        mesh = mesh._flatten("moebalance") if axes else mesh
    else:
        # Given even where it is one rank: no group at all would mean every rank there is.
        mesh = parallel_dims.get_optional_mesh("loss", include_singleton_axes=True)
    group: Group = mesh.get_group()
    return group


def _owners(model_parts: Sequence[nn.Module]) -> dict[str, Any]:
    """The MoE layers with a balanced router, by the name of the router."""
    found = {}
    for part in model_parts:
        for name, module in part.named_modules():
            if isinstance(getattr(module, "router", None), BalancedTopKRouter):
                found[bare_name(part, f"{name}.router" if name else "router")] = module
    return found


@torch.no_grad()
def _adopt(owner: Any, incompatible: Any) -> None:
    """After loading: go on from a selection bias that did not come from this state."""
    layer: RouterBalance = owner.router.balance
    bias: Tensor | None = local(owner.expert_bias_E)
    price = layer.price
    if bias is not None and price is not None:
        # Compared as the bias holds it: a bias in bfloat16 is our own price, rounded.
        same = bias == (-price).to(bias.dtype)
        layer.adopt(torch.where(same, price, -bias.float()))


@torch.no_grad()
def _publish(owners: list[Any]) -> None:
    """Write the prices into the layers' biases, where exports look for them."""
    for owner in owners:
        bias = local(owner.expert_bias_E)
        if bias is not None:
            bias.copy_(-owner.router.balance.price)


@torch.no_grad()
def _clear_counters(owners: list[Any]) -> None:
    """Do what the stock rule did at the end of a step: its counters would grow for ever."""
    torch._foreach_zero_([local(owner.tokens_per_expert_E) for owner in owners])
