"""Put balanced routers into a model's specification, where Megatron-Core asks for its modules."""

from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

from megatron.core import parallel_state  # type: ignore[import-not-found]
from megatron.core.transformer.moe.moe_layer import (  # type: ignore[import-not-found]
    MoESubmodules,
)
from megatron.core.transformer.moe.router import TopKRouter  # type: ignore[import-not-found]

from moebalance.integrations.megatron.router import BalancedTopKRouter
from moebalance.methods.base import Method

Spec = TypeVar("Spec")


def balanced_spec(spec: Spec, method: Method) -> Spec:
    """Copy a spec so that every MoE layer in it routes through a `BalancedTopKRouter`.

    Args:
        spec: of a layer, a block of layers, or one MoE layer.
        method: the method.

    A pipeline stage without an MoE layer keeps its spec.

    Raises:
        TypeError: `method` is no method.
        ValueError: no MoE layer in the spec of a model in one stage, or an MoE layer that has a
            router of its own kind.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r}: must be a Method such as PhiBalancing(strength=0.01).")
    found: list[MoESubmodules] = []
    copy: Spec = _replaced(spec, partial(BalancedTopKRouter, method=method), found)
    if not found and not _is_a_stage():
        raise ValueError(
            f"{type(spec).__name__} holds no MoE layer (no MoESubmodules): make it with "
            "num_experts, for example get_gpt_layer_local_spec(num_experts=8)."
        )
    return copy


def _is_a_stage() -> bool:
    """Whether this rank holds a part of the layers, which may all be dense."""
    if not parallel_state.model_parallel_is_initialized():
        return False
    stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    return stages > 1


def _replaced(part: Any, router: Any, found: list[MoESubmodules]) -> Any:
    """Copy whatever a spec is made of, with `router` in every MoE layer."""
    if isinstance(part, MoESubmodules):
        if part.router is not TopKRouter:
            raise ValueError(
                f"This spec's MoE layer routes by {part.router!r} already, and not by Megatron's "
                "TopKRouter: derive that class from BalancedTopKRouter instead."
            )
        found.append(part)
        return replace(part, router=router)
    if is_dataclass(part) and not isinstance(part, type):
        values = {f.name: getattr(part, f.name) for f in fields(part) if f.init}
        return replace(part, **_replaced(values, router, found))
    if isinstance(part, partial):  # from 0.18 on a layer is partial(MoELayer, submodules=…)
        arguments = _replaced(part.args, router, found), _replaced(part.keywords, router, found)
        return partial(part.func, *arguments[0], **arguments[1])
    if isinstance(part, dict):
        return {key: _replaced(value, router, found) for key, value in part.items()}
    if isinstance(part, list | tuple) and not hasattr(part, "_fields"):
        return type(part)(_replaced(value, router, found) for value in part)
    return part
