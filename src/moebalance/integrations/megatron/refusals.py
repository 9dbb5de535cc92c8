"""What in a Megatron configuration does not go with a balanced router, and the gate it asks for."""

from typing import Any

from moebalance.gates import Gate, Sigmoid, Softmax, SqrtSoftplus
from moebalance.methods.base import Method, inner_methods
from moebalance.methods.selection import Selecting
from moebalance.methods.z_loss import ZLoss

_GATES: dict[str, Gate] = {
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
    "sqrtsoftplus": SqrtSoftplus(),  # from 0.18 on
}
_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")
_OURS = {"sinkhorn": "Sinkhorn()", "quantile_balancing": 'QuantileBalancing(scale="nats")'}


def gate_of(config: Any) -> Gate:
    """How this configuration's scores come from its logits.

    Raises:
        ValueError: a score function that is not known.
    """
    name = config.moe_router_score_function
    if name not in _GATES:
        raise ValueError(f"moe_router_score_function={name!r}: must be one of {sorted(_GATES)}.")
    return _GATES[name]


def check_config(config: Any, method: Method) -> None:
    """Refuse what would be ignored in silence, or would balance a second time.

    Raises:
        ValueError: says which setting, and what to set instead.
    """
    _check_own_balancing(config)
    if config.moe_router_enable_expert_bias:
        _check_expert_bias(config, method)
    if config.moe_z_loss_coeff and _has(method, ZLoss):
        raise ValueError(
            f"moe_z_loss_coeff={config.moe_z_loss_coeff} and {method!r} would both charge the "
            "z-loss: keep one of the two."
        )
    if config.moe_router_fusion:
        raise ValueError(
            "moe_router_fusion=True: the fused kernel does not tell which experts it chose. Set "
            "moe_router_fusion=False."
        )
    for name in ("moe_router_force_load_balancing", "moe_router_force_biased"):
        if getattr(config, name, None):
            raise ValueError(
                f"{name}={getattr(config, name)} replaces the logits by noise, so there is nothing "
                f"to balance: leave {name} out, or keep Megatron's router."
            )


def _check_own_balancing(config: Any) -> None:
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, coefficients = [kinds], [coefficients]
    for kind, coefficient in zip(kinds, coefficients, strict=True):
        if kind not in ("none", *_LOSSES):
            hint = f" and take the method {_OURS[kind]}" if kind in _OURS else ""
            raise ValueError(
                f"moe_router_load_balancing_type={kind!r} does not go with a balanced router: set "
                f'"none"{hint}, or "global_aux_loss" with moe_aux_loss_coeff=0, by which Megatron '
                "tells its routers when a step ends."
            )
        if kind in _LOSSES and coefficient:
            raise ValueError(
                f"moe_router_load_balancing_type={kind!r} with moe_aux_loss_coeff={coefficient} "
                "would balance a second time: set moe_aux_loss_coeff=0."
            )


def _check_expert_bias(config: Any, method: Method) -> None:
    if config.moe_router_bias_update_rate:
        raise ValueError(
            "moe_router_enable_expert_bias with moe_router_bias_update_rate="
            f"{config.moe_router_bias_update_rate}: Megatron's update does not run under a "
            "balanced router. Set moe_router_bias_update_rate=0, and balance by LossFree(speed=…), "
            "alone or as Together(…, LossFree(speed=…)); without it the bias stays as loaded."
        )
    if method.traits.selects and not method.traits.has_selection_price:
        raise ValueError(
            f"{method!r} chooses experts by itself and would ignore the expert bias: set "
            "moe_router_enable_expert_bias=False."
        )


def goes_on_from_quantiles(method: Method, gate: Gate) -> bool:
    """Whether the method can take over a price that is subtracted from the logits.

    Under softmax log a and the logits differ by a constant for each token, so they rank alike.
    """
    parts = inner_methods(method) or (method,)
    nats = any(isinstance(part, Selecting) and part.scale == "nats" for part in parts)
    return nats and isinstance(gate, Softmax)


def _has(method: Method, kind: type[Method]) -> bool:
    return isinstance(method, kind) or any(_has(part, kind) for part in inner_methods(method))
