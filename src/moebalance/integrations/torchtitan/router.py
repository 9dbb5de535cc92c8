"""torchtitan's router with a balancing method inside.

It routes as `TokenChoiceTopKRouter` does, to the bit where the method leaves the choice alone. The
method's state is a child module of float32 buffers, so that torchtitan's checkpoints carry it; a
batch is counted and charged in its backward pass, so that neither activation checkpointing nor
evaluation counts anything twice or at all.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.models.common.moe import TokenChoiceTopKRouter  # type: ignore[import-not-found]
from torchtitan.protocols.module import Module  # type: ignore[import-not-found]

from moebalance.core.layer import LayerBalance
from moebalance.gates import Gate, Sigmoid, Softmax, top_experts
from moebalance.methods.base import Method

STATE = "balance"
"""Name of the child that holds a router's state, hence part of its checkpoint keys."""

_GATES: dict[str, Gate] = {"softmax": Softmax(), "sigmoid": Sigmoid()}


class RouterBalance(LayerBalance, Module):  # type: ignore[misc]
    """A layer's state as torchtitan builds modules: made on the meta device, filled in later."""

    def share(self, tokens: int) -> Float[Tensor, ""]:
        """These tokens' share of a step's, by the last step; 0 before the first has told.

        torchtitan divides its loss by the tokens of all ranks and micro-batches and adds gradients
        up undivided. A batch's mean, weighted with this share, does the same.
        """
        of_step, _ = self.last_step.unbind()
        # clamp: the unused branch of `where` must not divide by 0.
        return torch.where(of_step > 0, tokens / of_step.clamp(min=1), 0.0)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        """Make the state before the first step, where torchtitan wants buffers to be."""
        with torch.device(self.running.device if buffer_device is None else buffer_device):
            self._reset()


class BalancedTopKRouter(TokenChoiceTopKRouter):  # type: ignore[misc]
    """`TokenChoiceTopKRouter` under a balancing method.

    Args:
        config: the stock router's configuration and the method.

    Raises:
        ValueError: a score function of an unknown kind, or a choice forced round-robin.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):  # type: ignore[misc]
        """The stock router's configuration and the method."""

        method: Method

        def to_dict(self) -> dict[str, Any]:
            """What trackers are told: of the method its repr, which names classes too."""
            found: dict[str, Any] = TokenChoiceTopKRouter.Config.to_dict(self)
            return {**found, "method_repr": repr(self.method)}

    def __init__(self, config: "BalancedTopKRouter.Config") -> None:
        super().__init__(config)
        if config.score_func not in _GATES:
            raise ValueError(
                f"score_func={config.score_func!r}: moebalance balances routers by "
                f"{' or '.join(_GATES)}."
            )
        if config._debug_force_load_balance:
            raise ValueError(
                "debug.moe_force_load_balance sends tokens round-robin, whatever the router says: "
                f"{config.method!r} has nothing to balance. Switch one of the two off."
            )
        self.balance = RouterBalance(
            config.method, config.num_experts, gate=_GATES[config.score_func]
        )

    def forward(
        self,
        x_BLD: Tensor,  # noqa: N803 - torchtitan's own name
        expert_bias_E: Tensor | None = None,  # noqa: N803
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts and weigh them.

        Args:
            x_BLD: (B, L, D).
            expert_bias_E: (E,), the layer's bias; not looked at where the method has a price of its
                own, which that bias holds a copy of.

        Returns:
            Weights (B, L, K), experts (B, L, K) and affinities (B, L, E).
        """
        with torch.autocast(device_type=x_BLD.device.type, dtype=torch.float32):
            logits = self.gate(x_BLD)
        if not isinstance(logits, DTensor):
            return self._route(logits, local(expert_bias_E))
        # Every rank routes the tokens that it has; nothing here looks across tokens.
        mesh, placements = logits.device_mesh, logits.placements
        weights, experts, affinities = (
            DTensor.from_local(part, mesh, placements, run_check=False)
            for part in self._route(logits.to_local(), local(expert_bias_E))
        )
        return weights, experts, affinities

    def _route(
        self, logits: Float[Tensor, "B L E"], bias: Float[Tensor, "E"] | None
    ) -> tuple[Float[Tensor, "B L K"], Int[Tensor, "B L K"], Float[Tensor, "B L E"]]:
        softmax = self.score_func == "softmax"
        affinities = logits.softmax(dim=-1) if softmax else logits.sigmoid()
        order = self._order(logits, affinities.detach(), bias)
        if self.num_expert_groups is not None:
            order = self._get_node_limited_routing_scores(order)
        experts = top_experts(order, logits.detach(), self.top_k)
        weights = affinities.gather(-1, experts)
        if self.route_norm:
            # 1e-20: all chosen sigmoids of a token may underflow to 0.
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * self.route_scale
        flat = logits.flatten(0, -2)
        chosen = experts.flatten(0, -2)
        if self.training and torch.is_grad_enabled():
            share = self.balance.share(flat.shape[0])
            sequences = logits.shape[0]
            weights = self.balance.tie(weights, flat, chosen, sequences=sequences, weight=share)
        elif not self.training:
            self.balance.watch(flat, chosen)
        return weights, experts, affinities

    def _order(
        self,
        logits: Float[Tensor, "B L E"],
        affinities: Float[Tensor, "B L E"],
        bias: Float[Tensor, "E"] | None,
    ) -> Float[Tensor, "B L E"]:
        """What top-k ranks: by the method, else by the layer's bias as the stock router does."""
        price = self.balance.price
        if price is not None:
            return affinities - price
        flat = logits.flatten(0, -2)
        preference = self.balance.preference(flat, None, training=self.training)
        if preference is not None:
            return preference.view_as(affinities)
        if bias is not None:
            return affinities + bias
        return affinities if self.num_expert_groups is not None else logits.detach()


def local(tensor: Any) -> Any:
    """This rank's part of a distributed tensor, of which every rank has the whole; else itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
