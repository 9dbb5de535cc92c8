"""One batch through one router: logits, scores, choices, and the additive sums taken from them.

T tokens, E experts, K chosen experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.gates import Gate, on_host


class Routing(NamedTuple):
    """What one router did with one batch.

    Attributes:
        logits: z (T, E), from the router's linear map.
        scores: p (T, E), rows sum to one, float32 or wider, differentiable.
        experts: (T, K) int64, the experts that each token was sent to.
        gate: turns logits into scores.
        mask: (T,) True for a real token, False for padding; None if all are real.
        sequences: number of equally long sequences in which the T tokens lie, row by row.
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
    """Additive statistics: the sums of a concatenation are the sums of the parts' sums.

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
        # clamp: an empty batch has sums 0 and mean 0, not 0/0.
        return self.scores / self.tokens.clamp(min=1)

    @property
    def hard_load(self) -> Float[Tensor, "E"]:
        """f, the fraction of assignments per expert; zeros if no token was seen."""
        return self.counts / self.counts.sum(dim=-1, keepdim=True).clamp(min=1)


class Batch(NamedTuple):
    """One micro-batch and its place in the optimizer step.

    Attributes:
        routing: what the router did; None for a method whose traits say `from_sums`.
        sums: of this batch.
        step: sums of the step so far, with this batch, for a method whose coupling is "step"; for
            others this batch's own.
        fraction: this batch's part of the step's tokens, in (0, 1], for a method whose coupling is
            "batch" or "step"; for others 1.
        known: number of real tokens if the host knows it, at least 1.
    """

    routing: Routing
    sums: Sums
    step: Sums
    fraction: float | Tensor = 1.0
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
    """Sum what one batch did, without padding and without gradient.

    Args:
        routing: the batch.
        extra: further sums of a method, kept as they are.
    """
    real = real_rows(routing.scores.detach(), routing.mask)
    _, sums = count(real, None, routing.experts, routing.mask)
    return sums._replace(extra=tuple(extra))


def count(
    real: Float[Tensor, "T E"],
    row_scale: Float[Tensor, "T"] | None,
    experts: Int[Tensor, "T K"],
    mask: Bool[Tensor, "T"] | None,
) -> tuple[Float[Tensor, "2*E+2"], Sums]:
    """Count a batch: (Σ_t p_t, counts, tokens, 1) laid end to end, the 1 for the batch itself.

    Returns them as one vector, and as its views.

    Args:
        real: (T, E) affinities, 0 in padded rows.
        row_scale: (T,) turns affinities into scores; None if they are scores already.
        experts: (T, K), the choice.
        mask: (T,) True for real tokens, or None.
    """
    rows, num_experts = real.shape
    packed = real.new_zeros(2 * num_experts + 2)
    # Not by `split`, which goes through Python twice, and this runs once a batch.
    scores, counts, tokens, one = packed.split_with_sizes([num_experts, num_experts, 1, 1])
    one.fill_(1)
    # Each sum is written where it lies. Scores need not be formed: Σ_t a_t / S_t is a product.
    if row_scale is None:
        torch.sum(real, dim=0, out=scores)
    else:
        torch.mv(real.t(), row_scale, out=scores)
    # A single 1 is expanded, not allocated for every choice: (T·K,) of stride 0.
    ones = one.expand(experts.numel())
    if mask is None:
        tokens.fill_(rows)
    else:
        tokens.copy_(mask.sum())
        ones = mask.to(real.dtype).unsqueeze(-1).expand_as(experts).reshape(-1)
    counts.scatter_add_(0, experts.reshape(-1), ones)
    return packed, Sums(scores, counts, tokens.squeeze(0))


def split(packed: Float[Tensor, "*rows sums"], num_experts: int) -> Sums:
    """The sums that `count` laid end to end, of one layer or a row each, as views."""
    sizes = [num_experts, num_experts, 1, packed.shape[-1] - 2 * num_experts - 1]
    scores, counts, tokens, _ = packed.split_with_sizes(sizes, dim=-1)
    return Sums(scores, counts, tokens.squeeze(-1))


def real_tokens(mask: Tensor, name: str) -> Bool[Tensor, "*tokens"]:
    """A mask as booleans, True for real tokens. Only booleans or 0 and 1 are read.

    An additive mask (0 for real tokens, a large negative number for padding) says the opposite.
    Reading a floating-point mask waits for a GPU; booleans do not. Integers on a GPU are not read.

    Raises:
        TypeError: a floating-point mask under `torch.compile`, which cannot read it.
        ValueError: other numbers than 0 and 1, or a floating-point mask without a 1.
    """
    if mask.dtype == torch.bool:
        return mask
    floating = mask.is_floating_point()
    if torch.compiler.is_compiling():
        if floating:
            raise TypeError(f"{name} is {mask.dtype}: under torch.compile give booleans.")
        return mask != 0
    if (floating or mask.device.type == "cpu") and mask.numel() and not mask.is_meta:
        real = mask == 1
        # All zeros: an additive mask without padding looks the same as no real token at all.
        if not bool((real | (mask == 0)).all()) or (floating and not bool(real.any())):
            raise ValueError(
                f"{name} ({mask.dtype}) holds values from {mask.min().item():g} to "
                f"{mask.max().item():g}. It must be boolean, or 1 for real tokens and 0 for "
                "padding. If it is additive (0 and -inf), give mask == 0."
            )
    return mask != 0


def real_rows(values: Float[Tensor, "T *more"], mask: Bool[Tensor, "T"] | None) -> Tensor:
    """Values with padded rows set to 0, whatever they held: 0 · NaN would be NaN."""
    if mask is None:
        return values
    return torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0.0)


def as_number(tensor: Tensor) -> Any:
    """A number, or a list of a few, if reading it waits for no device; else the tensor.

    On a processor arithmetic on numbers is free, where every operation on a tensor is a kernel.
    """
    return tensor.tolist() if on_host(tensor) else tensor
