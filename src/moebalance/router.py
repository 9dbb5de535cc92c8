"""Two modules for a hand-written MoE layer: one routes, one counts and charges.

BalancedRouter   logits → weights and experts, top-k by any method
CountAndCharge   logits and the experts that your layer chose → the same logits
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.core.autograd import best, choose, normalized
from moebalance.core.layer import LayerBalance
from moebalance.gates import Gate, GroupLimit, Softmax
from moebalance.methods.base import Method

_SOFTMAX = Softmax()


class BalancedRouter(LayerBalance):
    """Top-k routing for a hand-written MoE layer, balanced by any method.

    Args:
        method: the method.
        num_experts: E.
        top_k: K, experts per token.
        gate: `Softmax()` or `Sigmoid()`.
        normalize: whether the K weights of a token are divided by their sum.
        limit: the groups of experts that a token may choose from; None for all experts. Quantile
            balancing does not know of it, and balances less well under one.
        fused: whether to run as one kernel each way where that can be (`kernels.supported`).
        name: what errors and logs call this layer.

    Raises:
        ValueError: top_k out of 1..E, a limit that does not fit, or shapes that do not.

    >>> from moebalance import PhiBalancing
    >>> router = BalancedRouter(PhiBalancing(), num_experts=8, top_k=2)
    >>> weights, experts = router(torch.randn(5, 8))
    >>> weights.shape, experts.shape
    (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    limit: GroupLimit | None = None  # also of a router that was pickled before there were limits

    def __init__(
        self,
        method: Method,
        num_experts: int,
        top_k: int,
        *,
        gate: Gate = _SOFTMAX,
        normalize: bool = True,
        limit: GroupLimit | None = None,
        fused: bool = True,
        name: str = "router",
    ) -> None:
        super().__init__(method, num_experts, gate=gate, fused=fused, name=name)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k={top_k} with num_experts={num_experts}: top_k must lie in 1..num_experts."
            )
        if limit is not None:
            if not isinstance(limit, GroupLimit):
                raise TypeError(f"limit={limit!r}: must be a GroupLimit such as GroupLimit(8, 4).")
            limit.check(num_experts, top_k)
        self.top_k, self.normalize, self.limit = top_k, normalize, limit

    def forward(
        self, logits: Float[Tensor, "*tokens E"], mask: Bool[Tensor, "*tokens"] | None = None
    ) -> tuple[Float[Tensor, "*tokens K"], Int[Tensor, "*tokens K"]]:
        """Choose experts and weigh them.

        Args:
            logits: (T, E) or (B, S, E), from the router's linear map.
            mask: (T,) or (B, S), True or nonzero for real tokens; None if all are real.

        Returns:
            Weights (…, K) in the logits' dtype and experts (…, K), int64; a token's experts in any
            order.
        """
        if logits.shape[-1] != self.num_experts:
            raise ValueError(
                f"{self.name}: logits of shape {tuple(logits.shape)} for {self.num_experts} "
                "experts: the last axis must be the experts."
            )
        if mask is not None and mask.shape != logits.shape[:-1]:
            raise ValueError(
                f"{self.name}: mask of shape {tuple(mask.shape)} for logits of shape "
                f"{tuple(logits.shape)}: it must have the logits' shape without the last axis."
            )
        rows = logits.dim() == 2  # then views would only cost time
        flat = logits if rows else logits.reshape(-1, self.num_experts)
        flat_mask = None if mask is None else mask.reshape(-1).bool()
        training = self.training and torch.is_grad_enabled() and not self.at_rest
        sequences = logits.shape[0] if logits.dim() == 3 else 1
        weights, experts = self._choose(flat, flat_mask, sequences, training=training)
        if not self.training:
            self.watch(flat, experts, mask=flat_mask)
        weights = weights.to(logits.dtype)
        if rows:
            return weights, experts
        shape = (*logits.shape[:-1], self.top_k)
        return weights.view(shape), experts.view(shape)

    def extra_repr(self) -> str:
        """Show the choice as well."""
        limit = "" if self.limit is None else f", limit={self.limit}"
        return f"{super().extra_repr()}, top_k={self.top_k}, normalize={self.normalize}{limit}"

    def _choose(
        self,
        logits: Float[Tensor, "T E"],
        mask: Bool[Tensor, "T"] | None,
        sequences: int,
        *,
        training: bool,
    ) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """Weights of the chosen experts, tied to counting and charging, and the choice."""
        traits, preference = self.traits, None
        if traits.selects and not traits.has_selection_price:
            preference = self.preference(logits, mask, training=self.training)
        # Where the two gradients are weighed they need branches of their own, which `tie` has.
        if training and logits.requires_grad and traits.from_sums and self.weighing is None:
            how = self._pass(top_k=self.top_k, normalize=self.normalize, limit=self.limit)
            return choose(logits, how, preference=preference, mask=mask)
        affinities = self.gate.affinities(logits)
        weights, experts = best(affinities, preference, self.price, self.top_k, self.limit)
        if self.normalize:
            weights, _ = normalized(weights)
        if training:
            weights = self.tie(weights, logits, experts, mask=mask, sequences=sequences)
        return weights, experts


class CountAndCharge(LayerBalance):
    """Balance a layer whose choice is its own: capacity, thresholds, token dropping, replay.

    Call it with the logits and the experts that your layer chose, and go on with the logits that
    it returns. They are unchanged. In backward the batch is counted, and the method's charge is
    added to their gradient. A method that selects acts through `selection_price`, which your layer
    subtracts from its affinities before it chooses.

    Args:
        method: the method.
        num_experts: E.
        gate: how this layer's scores come from its logits.
        fused: whether to use the fused kernels if they can run (`kernels.supported`).
        name: what errors and logs call this layer.

    >>> from moebalance import PhiBalancing
    >>> balance = CountAndCharge(PhiBalancing(), num_experts=8)
    >>> logits = torch.randn(5, 8, requires_grad=True)
    >>> balance(logits, logits.topk(2).indices).shape
    torch.Size([5, 8])
    """

    def forward(
        self,
        logits: Float[Tensor, "*tokens E"],
        experts: Int[Tensor, "*tokens K"],
        mask: Bool[Tensor, "*tokens"] | None = None,
    ) -> Float[Tensor, "*tokens E"]:
        """Count a batch and charge it; nothing else changes.

        Args:
            logits: (T, E) or (B, S, E), from the router's linear map. Use the returned ones.
            experts: (T, K) or (B, S, K), the experts that your layer chose.
            mask: (T,) or (B, S), True for real tokens; None if all are real.

        Returns:
            The logits, tied to the backward pass that counts and charges.
        """
        flat = logits.reshape(-1, self.num_experts)
        chosen = experts.reshape(-1, experts.shape[-1])
        real = None if mask is None else mask.reshape(-1).bool()
        if self.training and torch.is_grad_enabled() and not self.at_rest:
            sequences = logits.shape[0] if logits.dim() == 3 else 1
            flat = self.tie(flat, flat, chosen, mask=real, sequences=sequences)
        elif not self.training:
            self.watch(flat, chosen, mask=real)
        return flat.view(logits.shape)
