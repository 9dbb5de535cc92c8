"""What one router did with one batch: scores, choices and the additive sums taken from them.

Symbols: T tokens, E experts, K chosen experts per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.gates import Gate


class Routing(NamedTuple):
    """What one router did with one batch.

    Attributes:
        logits: z (T, E), as the router's linear map gave them.
        scores: p (T, E), rows sum to one, float32 at least, differentiable.
        experts: (T, K) int64, the experts each token was sent to.
        gate: how `scores` came from `logits`.
        mask: (T,) True for a real token, False for padding; None if all are real.
        sequences: number of equally long sequences the T tokens are laid out in, row by row.
    """

    logits: Float[Tensor, "T E"]
    scores: Float[Tensor, "T E"]
    experts: Int[Tensor, "T K"]
    gate: Gate
    mask: Bool[Tensor, "T"] | None = None
    sequences: int = 1

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scores.shape[-1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.experts.shape[-1]

    @property
    def tokens(self) -> Float[Tensor, ""]:
        """Number of real tokens."""
        if self.mask is None:
            return self.scores.new_full((), float(self.scores.shape[0]))
        return self.mask.sum().to(self.scores.dtype)

    @property
    def token_weights(self) -> Float[Tensor, "T"] | None:
        """1 for a real token, 0 for padding; None if all are real."""
        return None if self.mask is None else self.mask.to(self.scores.dtype)


class Sums(NamedTuple):
    """Additive statistics of a batch: those of a concatenation are the sums of the parts'.

    Attributes:
        scores: Σ_t p_t (E,).
        counts: number of tokens sent to each expert (E,).
        tokens: number of real tokens ().
        extra: further additive tensors that one method needs, for example a histogram.
    """

    scores: Float[Tensor, "E"]
    counts: Float[Tensor, "E"]
    tokens: Float[Tensor, ""]
    extra: tuple[Tensor, ...] = ()

    @property
    def soft_load(self) -> Float[Tensor, "E"]:
        """p̄, the mean score; zeros if no token was seen."""
        # clamp: an empty batch has sums 0 and shall have mean 0, not 0/0.
        return self.scores / self.tokens.clamp(min=1)

    @property
    def hard_load(self) -> Float[Tensor, "E"]:
        """f, the fraction of assignments per expert; zeros if no token was seen."""
        return self.counts / self.counts.sum(dim=-1, keepdim=True).clamp(min=1)


class Batch(NamedTuple):
    """One batch and its place in the optimizer step it belongs to.

    Attributes:
        routing: what the router did with this batch; None to a method that says it reads the sums
            alone (`Method.from_sums`).
        sums: this batch's sums.
        step: sums of the step so far, this batch included; for methods whose `coupling` is "step",
            to others this batch's own.
        share: this batch's share of the tokens of its step, in (0, 1]; for methods whose `coupling`
            is "batch" or "step", to others 1.
        known: number of its tokens where the host knows it, since none is padding; at least 1.
    """

    routing: Routing
    sums: Sums
    step: Sums
    share: float | Tensor = 1.0
    known: int | None = None

    @property
    def tokens(self) -> int | Tensor:
        """Number of real tokens, at least 1: an empty batch has mean 0, not 0/0."""
        return self.sums.tokens.clamp(min=1) if self.known is None else self.known

    @property
    def soft_load(self) -> Float[Tensor, "E"]:
        """p̄ of this batch."""
        return self.sums.scores / self.tokens

    @property
    def hard_load(self) -> Float[Tensor, "E"]:
        """f of this batch."""
        return self.sums.hard_load


def route(
    logits: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    gate: Gate,
    *,
    mask: Bool[Tensor, "T"] | None = None,
    sequences: int = 1,
) -> Routing:
    """Describe what a router did, given its logits and its choice.

    >>> from moebalance.gates import Softmax
    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> route(logits, logits.topk(2).indices, Softmax()).scores.sum().item()
    1.0
    """
    return Routing(logits, gate.scores(logits), experts, gate, mask, sequences)


def measure(routing: Routing, extra: Sequence[Tensor] = ()) -> Sums:
    """Sum what one batch did: scores, assignment counts and tokens, padding left out."""
    found = add_up(routing.scores, routing.experts, routing.mask)
    return found._replace(extra=tuple(extra))


def add_up(
    scores: Float[Tensor, "T E"], experts: Int[Tensor, "T K"], mask: Bool[Tensor, "T"] | None
) -> Sums:
    """Σ_t p_t, the counts of the choice and the number of tokens, over real tokens."""
    if mask is None:
        tokens = scores.new_full((), float(scores.shape[0]))
        # A constant 1 is expanded rather than allocated: (T·K,) of stride 0.
        ones = scores.new_ones(()).expand(experts.numel())
    else:
        tokens = mask.sum().to(scores.dtype)
        ones = mask.to(scores.dtype).unsqueeze(-1).expand_as(experts).reshape(-1)
    total = real_rows(scores, mask).sum(dim=0)
    counts = torch.zeros_like(total).scatter_add(0, experts.reshape(-1), ones)
    return Sums(total, counts, tokens)


def real_rows(values: Float[Tensor, "T *more"], mask: Bool[Tensor, "T"] | None) -> Tensor:
    """Values with padded rows set to 0, whatever they held: 0 · NaN would be NaN."""
    if mask is None:
        return values
    return torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0.0)
