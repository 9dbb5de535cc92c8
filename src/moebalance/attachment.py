"""One call that attaches a method to any MoE model."""

import sys

from torch import nn

from moebalance.core.distributed import Group
from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.core.state import bare_name
from moebalance.methods.base import Method
from moebalance.router import BalancedRouter


def attach(
    model: nn.Module,
    method: Method | None = None,
    *,
    group: Group | None = None,
    keep_native_loss: bool = False,
    fused: bool = True,
) -> Balancing:
    """Balance every MoE router of a model, without changing the model.

    Attach before compiling; before or after moving to another dtype or, uncompiled, to another
    device. With PEFT, attach to what `get_peft_model` returned.

    Args:
        model: a Transformers MoE model (PEFT-wrapped or not), or any module with `BalancedRouter`s.
        method: the method. Left out for a model of `BalancedRouter`s, which carry their own.
        group: the ranks that hold these layers and disjoint tokens; None for the default process
            group where there is one.
        keep_native_loss: leave a Transformers model's own balancing loss on, as one who only
            watches would.
        fused: whether to take the fused kernels where they run: on an NVIDIA GPU with Triton.

    Returns:
        The handle: `step()` after each optimizer step, `metrics()`, `state_dict()`, `detach()`.

    Raises:
        ValueError: no router found, one of an unknown kind, one balanced already, a frozen one
            under a method that needs its gradient, or a lever that it does not have.
        TypeError: `model` or `method` is something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach needs a torch module; got {type(model).__name__}.")
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"method={method!r}: must be a Method such as PhiBalancing(strength=1e-3).")
    routers = {n: m for n, m in model.named_modules() if isinstance(m, BalancedRouter)}
    if routers:
        return _own(model, routers, method, group, fused=fused)
    # Asking for Transformers would import it; a model of its kind can only exist if it is there.
    if "transformers" in sys.modules:
        from moebalance.integrations import huggingface

        if huggingface.serves(model):
            if method is None:
                raise TypeError("attach(model, method): a Transformers model needs a method.")
            return huggingface.attach(
                model, method, group=group, keep_native_loss=keep_native_loss, fused=fused
            )
    raise ValueError(
        f"{type(model).__name__} is neither a Transformers model nor has it a "
        "moebalance.BalancedRouter: route its MoE layers with BalancedRouter (see the example "
        "examples/plain_pytorch.py). For a Megatron-Core model, take balanced_spec and attach of "
        "moebalance.integrations.megatron."
    )


def _own(
    model: nn.Module,
    routers: dict[str, BalancedRouter],
    method: Method | None,
    group: Group | None,
    *,
    fused: bool,
) -> Balancing:
    methods = {router.method for router in routers.values()}
    if method is not None:
        raise ValueError(
            f"This model's BalancedRouters carry {methods} already: call attach(model) without a "
            f"method, or build them with {method!r}."
        )
    if len(methods) > 1:
        raise ValueError(f"One handle steps one method, but the routers carry {methods}.")
    layers: dict[str, LayerBalance] = {}
    for wrapped, router in routers.items():
        name = bare_name(model, wrapped)
        router.name = name or router.name
        router.fused &= fused
        layers[name or "router"] = router
    return Balancing(methods.pop(), layers, group=group)
