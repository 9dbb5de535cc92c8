"""Turn a torchtitan configuration into a balanced one: router, optimizer hook, export, metrics."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from torchtitan.components.metrics import MetricsProcessor  # type: ignore[import-not-found]
from torchtitan.components.optimizer import (  # type: ignore[import-not-found]
    register_moe_load_balancing_hook,
)
from torchtitan.config.override import derive  # type: ignore[import-not-found]
from torchtitan.models.common.moe import (  # type: ignore[import-not-found]
    MoE,
    TokenChoiceTopKRouter,
)

from moebalance.integrations.pipelining import ignore_trial_runs
from moebalance.integrations.torchtitan.router import STATE, BalancedTopKRouter, RouterBalance
from moebalance.integrations.torchtitan.steps import drive
from moebalance.methods.base import Method, price_in_force

logger = logging.getLogger("moebalance")

_HAS_BIAS = 1e-3


def balanced(config: Any, method: Method) -> Any:
    """Put a method into every MoE layer of a `Trainer.Config`, in place of torchtitan's own rule.

    Args:
        config: a `Trainer.Config` with a `model_spec`, as functions of a `config_registry` return.
            It is changed.
        method: the method.

    Returns:
        `config`.

    Raises:
        TypeError: `method` is not a method, or a router is of a class of its own.
        ValueError: no MoE layer, or a configuration that is balanced already.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r}: must be a Method such as PhiBalancing(strength=0.01).")
    spec = config.model_spec
    layers = [] if spec is None else list(spec.traverse(MoE.Config))
    if not layers:
        raise ValueError(
            "This configuration has no MoE layer to balance: no MoE.Config lies in its "
            f"model_spec ({getattr(spec, 'name', None)}, {getattr(spec, 'flavor', None)})."
        )
    for name, layer, _, _ in layers:
        layer.router = _derived(name, layer.router, method)
        if method.traits.has_selection_price and layer.load_balance_coeff is None:
            # The stock rule is switched off later; this only makes the layer have a bias.
            layer.load_balance_coeff = _HAS_BIAS
    spec.post_optimizer_build_fn = partial(
        _after_optimizers, method=method, theirs=spec.post_optimizer_build_fn
    )
    if spec.pipelining_fn is not None:
        spec.pipelining_fn = partial(_pipelining, theirs=spec.pipelining_fn)
    if spec.state_dict_adapter is not None:
        price, _ = price_in_force(method, method.init(layers[0][1].router.num_experts))
        spec.state_dict_adapter = _exporting(
            spec.state_dict_adapter, method, priced=price is not None
        )
    if type(config.metrics) is MetricsProcessor.Config:
        config.metrics = derive(config.metrics, BalanceMetrics.Config)
    return config


class BalanceMetrics(MetricsProcessor):  # type: ignore[misc]
    """torchtitan's metrics and `moe/maxvio`, `moe/dead` and the others of a step.

    The ranks of a pipeline stage share one set of numbers, on the layers of that stage.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):  # type: ignore[misc]
        """As torchtitan's."""

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log one step."""
        balancing = getattr(self.optimizers, "balancing", None)
        found = {} if balancing is None else balancing.metrics()
        extra = {**(extra_metrics or {}), **{f"moe/{key}": v for key, v in found.items()}}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra)


def _derived(name: str, router: Any, method: Method) -> Any:
    if isinstance(router, BalancedTopKRouter.Config):
        raise ValueError(
            f"{name} is balanced by {router.method!r} already: call balanced() once, with "
            "Together(…, …) for two methods."
        )
    if type(router) is not TokenChoiceTopKRouter.Config:
        bins = getattr(router, "num_bins", None)
        instead = "Route that layer with moebalance.BalancedRouter."
        if bins is not None:  # QuantileBalancedTopKRouter, of torchtitan's main branch
            instead = (
                "Give the layer a TokenChoiceTopKRouter.Config; QuantileBalancing("
                f"bins={bins}) is that router's rule as a method of this library."
            )
        raise TypeError(
            f"{name} has a router of its own, {type(router).__qualname__}: balanced() knows "
            f"torchtitan's TokenChoiceTopKRouter. {instead}"
        )
    return derive(router, BalancedTopKRouter.Config, method=method)


def _after_optimizers(
    optimizers: Any, model_parts: Any, parallel_dims: Any, *, method: Method, theirs: Any
) -> None:
    """Drive the balancing, then do what the model's own hook did beside balancing."""
    drive(optimizers, model_parts, parallel_dims, method=method)
    if theirs is not None and theirs is not register_moe_load_balancing_hook:
        theirs(optimizers, model_parts, parallel_dims)


def _pipelining(*args: Any, theirs: Any, **kwargs: Any) -> Any:
    """Split a model into pipeline stages, whose trial runs are not to be counted."""
    schedule, parts, first, last = theirs(*args, **kwargs)
    # One stage a rank, or several: torch has a class of schedules for each.
    stages = schedule._stages if hasattr(schedule, "_stages") else [schedule._stage]
    layers = [m for part in parts for m in part.modules() if isinstance(m, RouterBalance)]
    if layers:
        ignore_trial_runs(stages, layers)
    return schedule, parts, first, last


def _exporting(adapter: Any, method: Method, *, priced: bool) -> Any:
    """An adapter to and from Hugging Face's names that leaves the method's state out.

    It warns where the method trains a price and the names have no place for it.
    """

    class BalancedAdapter(adapter):  # type: ignore[misc]
        def __init__(self, model_config: Any, hf_assets_path: str | None) -> None:
            super().__init__(model_config, hf_assets_path)
            names = [str(name) for name in getattr(self, "from_hf_map", {}).values()]
            biased = any("expert_bias" in name for name in names)
            held = biased and method.traits.has_selection_price
            if priced and names and not held:
                logger.warning(
                    "moebalance: %r trains a selection price, and %s has no name for it: exported "
                    "to Hugging Face, this model would route without it. Keep torchtitan's own "
                    "checkpoints, or train with PhiBalancing, which charges in the loss.",
                    method,
                    adapter.__name__,
                )

        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            kept = {key: v for key, v in state_dict.items() if f".router.{STATE}." not in key}
            found: dict[str, Any] = super().to_hf(kept)
            return found

    return BalancedAdapter
