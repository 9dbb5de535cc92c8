"""Megatron-Core's TopKRouter, balanced by any method: the same forward, another `routing`.

Choice, counting and charge go through Megatron's own functions. The term's gradient is added to the
logits in the backward pass, times what Megatron scales its own auxiliary losses by,

    MoEAuxLossAutoScaler.main_loss_backward_scale = gradient scaler · CP / micro-batches,

and times this rank's share of the micro-batch's tokens, over tensor and context parallel ranks:
their gradients are added up, and so are those of data-parallel ranks, over DP · CP. The term is
then α times a mean over the tokens of the step, however they are split. With
`calculate_per_token_loss` gradients are divided by the number of tokens with a loss instead; there
this batch's factor is its token count.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from megatron.core.transformer.moe.moe_utils import (  # type: ignore[import-not-found]
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter  # type: ignore[import-not-found]
from torch import Tensor

from moebalance.core.distributed import start_sum
from moebalance.core.layer import LayerBalance, loads_strictly
from moebalance.core.sequences import packed
from moebalance.integrations.megatron.packed import bounds
from moebalance.integrations.megatron.refusals import (
    check_config,
    gate_of,
    goes_on_from_quantiles,
)
from moebalance.methods.base import Method

logger = logging.getLogger("moebalance")

_QUANTILES = (
    "{} was trained by Megatron's quantile balancing, which ranks experts by logit - qb_beta. {} "
    "cannot go on from it. With softmax scores a method with a price in nats can, for example "
    'QuantileBalancing(scale="nats"). Or delete the qb_beta entries from the checkpoint to start '
    "with all prices 0."
)


class BalancedTopKRouter(TopKRouter):  # type: ignore[misc]
    """A TopKRouter whose experts are balanced by a `Method`; put it into a spec.

    Its state lies in float32 buffers of its own under `balance`, which checkpoints hold. A method
    that prices selection writes −price to Megatron's `expert_bias` where
    `moe_router_enable_expert_bias` asks for one; elsewhere the experts are ranked by the price.

    Args:
        config: the model's TransformerConfig.
        pg_collection: process groups, as for TopKRouter.
        method: the method.

    Raises:
        ValueError: the configuration asks for a balancing of Megatron's own, or for something that
            this router cannot do.
    """

    def __init__(
        self, config: Any, pg_collection: Any = None, *, method: Method, **known_later: Any
    ) -> None:
        check_config(config, method)
        super().__init__(config=config, pg_collection=pg_collection, **known_later)
        layer = LayerBalance(method, config.num_moe_experts, gate=gate_of(config))
        self.balance = layer.to(torch.cuda.current_device())
        self.check_stepped: Callable[[], None] | None = None
        """Raises if nothing ends the steps of this router; set by `attach`."""
        self.on_reset: Callable[[BalancedTopKRouter], None] | None = None
        """Called when Megatron ends a step by `reset_global_aux_loss_tracker`."""
        self.packed_seq_params: Any = None
        """Megatron's, of the micro-batch in progress; told by the layer, see `packed.py`."""
        self._replayed = False

    def routing(
        self, logits: Float[Tensor, "S B E"], padding_mask: Bool[Tensor, "S B"] | None = None
    ) -> tuple[Float[Tensor, "T E"], Bool[Tensor, "T E"]]:
        """Choose experts and weigh them, in training also count and charge.

        Args:
            logits: (S, B, E), from `gating`.
            padding_mask: (S, B), True for padding, the opposite of the rest of this library.

        Returns:
            Weights and choice (T, E), T = S · B.
        """
        length, sequences = logits.shape[:2]
        logits = logits.view(-1, self.balance.num_experts)
        padding = None if padding_mask is None else padding_mask.reshape(-1).bool()
        real = None if padding is None else ~padding
        training = self.training and torch.is_grad_enabled()
        if training:
            self._check_ready()
        logits = self.apply_z_loss(logits, padding_mask=padding)
        weights, chosen, experts = self._choose(logits, real)
        if self.config.moe_expert_capacity_factor is not None:
            # What is counted below is the demand, before tokens are dropped.
            weights, chosen = apply_router_token_dropping(
                weights,
                chosen,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if training:
            weights = self._inject(weights, logits, experts, real, (length, sequences))
        elif not self.training:
            self.balance.watch(logits, experts, mask=real)
        return weights, chosen

    def reset_global_aux_loss_tracker(self) -> None:
        """End the step: Megatron calls this where `global_aux_loss` is configured."""
        super().reset_global_aux_loss_tracker()
        if self.on_reset is not None:
            self.on_reset(self)

    @torch.no_grad()
    def publish_price(self) -> None:
        """Write the price in force to Megatron's own bias, if there are both."""
        price = self.balance.price
        if price is not None and self.expert_bias is not None:
            self.expert_bias.copy_(-price)

    def _choose(
        self, logits: Float[Tensor, "T E"], real: Bool[Tensor, "T"] | None
    ) -> tuple[Float[Tensor, "T E"], Bool[Tensor, "T E"], Int[Tensor, "T K"]]:
        """Megatron's top-k, groups and weights, ranked by what the method prefers."""
        config, preference = self.config, None
        if self.expert_bias is None:
            preference = self.balance.preference(logits, real, training=self.training)
        choice = _Choice(preference, self.router_replay)
        weights, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            router_replay=choice,
        )
        return weights, chosen, choice.experts

    def _inject(
        self,
        weights: Float[Tensor, "T E"],
        logits: Float[Tensor, "T E"],
        experts: Int[Tensor, "T K"],
        real: Bool[Tensor, "T"] | None,
        layout: tuple[int, int],
    ) -> Tensor:
        """Tie counting and charge to the weights' backward pass."""
        factor, sequences, ends = self._factor(logits, real), layout[1], bounds(self)
        if ends is not None:
            lay = packed(ends, len(logits), real, rows=True, name=self.balance.name)
            logits, experts, real = lay.arranged(logits, experts)
            sequences = lay.sequences
        elif sequences > 1:
            # Megatron lays tokens out position by position, methods read sequence by sequence.
            logits, experts = _by_sequence(logits, layout), _by_sequence(experts, layout)
            real = None if real is None else _by_sequence(real, layout)
        carried = self.balance.tie(
            weights,
            logits,
            experts,
            mask=real,
            sequences=sequences,
            weight=factor,
            replayed=self._replays(),
        )
        if carried.requires_grad:
            carried.register_hook(self._take_scale)  # type: ignore[no-untyped-call]
        return carried

    def _replays(self) -> bool:
        """Whether the choice in force came from elsewhere, such as a rollout."""
        action = getattr(self.router_replay, "router_replay_action", None)
        name = getattr(action, "name", None)
        if name != "REPLAY_BACKWARD":  # that is a recomputation of the last forward
            self._replayed = name == "REPLAY_FORWARD"
        return self._replayed

    def _factor(
        self, logits: Float[Tensor, "T E"], real: Bool[Tensor, "T"] | None
    ) -> Float[Tensor, ""] | None:
        """What this rank's mean over its tokens is worth; see the module's text."""
        ranks, calls = self.tp_cp_group.size(), self._calls()
        if ranks == calls == 1 and not self.calculate_per_token_loss:
            return None
        if real is None or (ranks == 1 and not self.calculate_per_token_loss):
            worth = logits.shape[0] if self.calculate_per_token_loss else 1 / ranks
            return torch.full((), worth / calls, device=logits.device)
        tokens = real.sum().float()
        if self.calculate_per_token_loss:
            return tokens / calls
        # Padding is spread unevenly: one number is summed, as Megatron sums E of them.
        (total,) = start_sum([tokens.reshape(1)], self.tp_cp_group, "their tokens").wait()
        return tokens / total.squeeze(0).clamp(min=1) / calls

    def _calls(self) -> int:
        """How often a forward of the model comes by: a repeated prediction layer has one router."""
        mtp = getattr(self, "is_mtp_layer", False) and self.config.mtp_use_repeated_layer
        return int(self.config.mtp_num_layers or 1) if mtp else 1

    def _take_scale(self, gradient: Tensor) -> None:
        """Megatron sets its scale after each forward; this runs just before the charge."""
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        if scale is not None:
            self.balance.loss_scale.copy_(scale.reshape(()))

    def _check_ready(self) -> None:
        if self.check_stepped is None:
            raise RuntimeError(
                "This balanced router belongs to no handle, so no step of it would ever end: call "
                "moebalance.integrations.megatron.attach(model) once, after building the model."
            )
        self.check_stepped()
        if self.tp_group.size() > 1 and not self.config.sequence_parallel:
            raise RuntimeError(
                f"tensor_model_parallel_size={self.tp_group.size()} without sequence_parallel: "
                "every rank would count the same tokens. Set sequence_parallel=True."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        quantiles = state_dict.pop(f"{prefix}qb_beta", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        own = f"{prefix}balance."
        if any(key.startswith(own) for key in state_dict):
            return
        # Trained with Megatron's router: go on from its bias, with a memory that begins anew.
        if loads_strictly():
            self.balance.begin_anew()
        if quantiles is not None:
            self._adopt_quantiles(quantiles, f"{prefix}qb_beta", errors=rest[-1])
        elif self.expert_bias is not None:
            self.balance.adopt(-self.expert_bias)
        state_dict.update(self.balance.state_dict(prefix=own))

    def _adopt_quantiles(self, price: Float[Tensor, "E"], name: str, errors: list[str]) -> None:
        method, gate = self.balance.method, self.balance.gate
        if goes_on_from_quantiles(method, gate):
            self.balance.adopt(price)
        elif price.any():
            errors.append(_QUANTILES.format(name, method))


class _Choice:
    """Stands where Megatron asks a RouterReplay for the top-k: ranks as told and remembers."""

    def __init__(self, preference: Float[Tensor, "T E"] | None, replay: Any) -> None:
        self.preference, self.replay = preference, replay
        self.experts: Int[Tensor, "T K"]

    def get_replay_topk(
        self,
        scores: Float[Tensor, "T E"],
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        compute: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        ranked = scores if self.preference is None else self.preference
        if self.replay is None:
            values, self.experts = compute(
                ranked, topk, num_groups=num_groups, group_topk=group_topk
            )
        else:
            values, self.experts = self.replay.get_replay_topk(
                ranked, topk, num_groups, group_topk, compute
            )
        if self.preference is not None:
            values = scores.gather(1, self.experts)
        return values, self.experts


def _by_sequence(rows: Tensor, layout: tuple[int, int]) -> Tensor:
    """Rows (S·B, …) position by position → (B·S, …) sequence by sequence."""
    return rows.view(*layout, *rows.shape[1:]).transpose(0, 1).flatten(0, 1)
