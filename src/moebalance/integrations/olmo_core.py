"""OLMo-core: balance its MoE routers by any method, stepped by its own train module.

    model = config.build()                                  # a MoETransformer
    balancing = olmo_core.attach(model, mb.PhiBalancing())

Two methods of each router are wrapped on the instance: `get_expert_logits`, to see the logits, and
`get_top_k`, to choose and to count. `post_batch`, which OLMo-core's train module calls after the
last backward of a step, ends the step; OLMo-core's own bias rule does not run any more.

OLMo-core divides its loss by the tokens of the rank's batch (`loss_div_factor`) and averages
gradients over ranks. The term is divided alike: strength × the mean over the step's tokens.
Written for ai2-olmo-core 3.0; not for compiled blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from olmo_core.nn.moe.router import (  # type: ignore[import-not-found]
    MoELinearRouter,
    MoERouter,
)
from torch import Tensor, nn

from moebalance.core.distributed import Group
from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.gates import Gate, Sigmoid, Softmax, top_experts
from moebalance.integrations.copies import Hook, release
from moebalance.methods.base import Method, refuse_frozen

_GATES: dict[str, Gate] = {"softmax": Softmax(), "sigmoid": Sigmoid()}


def attach(model: nn.Module, method: Method, *, group: Group | None = None) -> Balancing:
    """Balance every router of an OLMo-core model.

    A method with a selection price keeps -price in `score_bias` where the router has one
    (`bias_gamma` is set); elsewhere the experts are ranked by the price.

    Args:
        model: a model with `MoELinearRouter`s, before it is compiled.
        method: the method.
        group: the ranks that hold these layers and disjoint tokens, for pipeline stages; None for
            all ranks.

    Returns:
        The handle. `post_batch` steps it.

    Raises:
        ValueError: no router, one of another kind, one that is frozen under a method that needs its
            gradient, balanced already, or set to balance or to be forced by itself.
    """
    release(model)
    routers = {n or "router": m for n, m in model.named_modules() if isinstance(m, MoERouter)}
    _refuse_others(model, routers)
    layers = {}
    for name, router in routers.items():
        _check(name, router, method)
        layer = LayerBalance(method, router.num_experts, gate=_gate(name, router), name=name)
        layers[name] = layer.to(router.weight.device)
    balancing = Balancing(method, layers, group=group)
    for place, (name, router) in enumerate(routers.items()):
        wrapped = _Wrapped(layers[name], router)
        balancing.on_detach(wrapped.remove)
        end = partial(_end, balancing, list(routers.values())) if place == 0 else _nothing
        router.post_batch = end
        if method.traits.has_selection_price and router.score_bias is not None:
            layers[name].adopt(-router.score_bias)
            balancing.on_step(partial(_publish, router, layers[name]))
        elif layers[name].trains_price:
            balancing.price_outside.add(name)
    return balancing


class _Wrapped(Hook):
    """One router's two methods, with the balancing in between.

    Args:
        layer: the layer's state.
        router: the router.
    """

    def __init__(self, layer: LayerBalance, router: Any) -> None:
        self.layer, self.router = layer, router
        self.logits_of, self.top_k_of = router.get_expert_logits, router.get_top_k
        self.logits: Float[Tensor, "B S E"]
        self.divisor: Any = None
        native = router.score_bias is not None and layer.traits.has_selection_price
        self.reselect = layer.traits.selects and not native
        self.hook = router.register_forward_pre_hook(self.before, with_kwargs=True)
        router.get_expert_logits, router.get_top_k = self.get_expert_logits, self.get_top_k

    def before(self, router: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note by what this batch's loss is divided."""
        self.divisor = kwargs.get("loss_div_factor")

    def get_expert_logits(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S E"]:
        """OLMo-core's, remembered."""
        self.logits = self.logits_of(x).float()
        return self.logits

    def get_top_k(
        self, scores: Float[Tensor, "B S E"]
    ) -> tuple[Float[Tensor, "B S K"], Int[Tensor, "B S K"]]:
        """OLMo-core's choice or the method's; in training it is counted and charged in backward."""
        layer, training = self.layer, self.router.training
        counts = training and torch.is_grad_enabled() and not self.at_rest
        logits = self.logits.flatten(0, -2)  # (T,E)
        weights, experts = self.top_k_of(scores)
        if self.reselect:
            preference = layer.preference(logits, None, training=training)
            if preference is not None:
                experts = top_experts(preference, logits.detach(), self.router.top_k)
                experts = experts.view(*scores.shape[:-1], -1)
                weights = scores.gather(-1, experts)
        chosen = experts.flatten(0, -2)  # (T,K)
        if counts:
            sequences, share = scores.shape[0], self._share(logits)
            weights = layer.tie(weights, logits, chosen, sequences=sequences, weight=share)
        elif not training:
            layer.watch(logits, chosen)
        return weights, experts

    def remove(self) -> None:
        """Give the router its methods back."""
        self.hook.remove()
        for name in ("get_expert_logits", "get_top_k", "post_batch"):
            del self.router.__dict__[name]

    def _share(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, ""] | None:
        """This batch's part of the step's tokens; None where the loss is a mean already."""
        if self.divisor is None:
            return None
        return torch.as_tensor(logits.shape[0] / self.divisor, device=logits.device).float()


def _end(balancing: Balancing, routers: list[Any], dry_run: bool = False) -> None:
    """End the step, in place of OLMo-core's own rule."""
    if balancing.at_rest or not routers[0].training:
        return
    for router in routers:
        if router.bias_gamma is not None:
            router.score_bias_batch_size_per_expert.zero_()
    if dry_run:
        balancing.discard()
    else:
        balancing.step()


def _nothing(dry_run: bool = False) -> None:
    """The step ends at the first router, for all."""


@torch.no_grad()
def _publish(router: Any, layer: LayerBalance) -> None:
    price = layer.price
    if price is not None:
        router.score_bias.copy_(-price)


def _gate(name: str, router: Any) -> Gate:
    if router.gating_function not in _GATES:
        raise ValueError(
            f"{name}: gating_function={str(router.gating_function)!r} is not known here: must be "
            f"one of {sorted(_GATES)}."
        )
    return _GATES[router.gating_function]


def _refuse_others(model: nn.Module, routers: dict[str, Any]) -> None:
    """Refuse a model without routers, and routers of other classes."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Router" in kind and not isinstance(module, MoELinearRouter):
            raise ValueError(
                f"{name} is a {kind}, which moebalance does not know: it balances OLMo-core's "
                "MoELinearRouter (MoERouterConfig)."
            )
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no MoELinearRouter: give a model of OLMo-core whose "
            "blocks have a feed_forward_moe."
        )


def _check(name: str, router: Any, method: Method) -> None:
    own: dict[str, Callable[[Any], bool]] = {
        "lb_loss_weight": bool,
        "uniform_expert_assignment": bool,
        "random_expert_assignment": bool,
    }
    for setting, is_on in own.items():
        value = getattr(router, setting)
        if is_on(value):
            raise ValueError(
                f"{name} has {setting}={value}, which would balance, or choose, a second time: "
                f"leave {setting} out of the router's configuration."
            )
    if "get_top_k" in router.__dict__:
        raise ValueError(f"{name} is balanced already: detach() the first Balancing before.")
    refuse_frozen(name, method, trains=router.weight.requires_grad)
    traits = method.traits
    if router.score_bias is not None and traits.selects and not traits.has_selection_price:
        raise ValueError(
            f"{method!r} chooses experts by itself and would ignore {name}'s score_bias: set "
            "bias_gamma=None."
        )
