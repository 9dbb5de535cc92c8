"""Counting batches into their step: how sums are packed, and what a batch is charged by them.

    running ← running + packed,        packed = (Σ_t p_t, counts, tokens, 1, the method's own)

All that a layer counts in a step is one vector, so that ranks add it up in one message. A method
whose price is formed `from_sums` charges every token alike: the price by strength, scale and E / T.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance import kernels
from moebalance.gates import Gate
from moebalance.methods.base import Method, State, per_token, read
from moebalance.routing import Batch, Sums


class Tally(NamedTuple):
    """The tensors a layer's backward reads and writes.

    Attributes:
        running: packed sums of the step so far (see `pack`); added to in place.
        last_step: (2,) tokens and batches of the last finished step.
        scale: () gradient of the total loss with respect to the task loss.
    """

    running: Float[Tensor, "sums"]
    last_step: Float[Tensor, "2"]
    scale: Float[Tensor, ""]

    def weighed(self, weight: Float[Tensor, ""] | None) -> "Tally":
        """The same for a batch of this weight in the mean over its step; None for 1."""
        return self if weight is None else self._replace(scale=self.scale * weight)


def place(
    method: Method, tally: Tally, sums: Sums, *, known: int | None, routing: Any = None
) -> Batch:
    """Say what the place of a batch, counted already, is in its step.

    Args:
        method: the method.
        tally: the layer's.
        sums: of the batch.
        known: number of its tokens, if the host knows it.
        routing: that of the batch, or None for a method that reads sums alone.
    """
    # What a method couples is all of its surroundings that it may look at.
    step, coupling = sums, method.coupling
    share: float | Tensor = 1.0
    if coupling == "step":
        step = unpack(tally.running, method, sums.scores.shape[-1])
    if coupling in ("batch", "step"):
        share = _share(sums.tokens, known, tally.last_step)
    return Batch(routing, sums, step, share, known)


def settle(
    method: Method,
    state: State,
    tally: Tally,
    packed: Float[Tensor, "sums"],
    *,
    known: int | None,
    fused: bool = False,
) -> Float[Tensor, "E"] | None:
    """Add a batch to its step, and say what a token's scores are charged by a method `from_sums`.

    Args:
        method: the method.
        state: the method's.
        tally: the layer's.
        packed: sums of the batch.
        known: number of its tokens, if the host knows it.
        fused: whether to do it in one launch where the price has such a form.
    """
    if fused:
        price = method.mean_price(state)
        if kernels.forms(price):
            return kernels.charge(price, packed, *tally)
    tally.running.add_(packed)
    if not method.charges:
        return None
    sums = unpack(packed, method, packed.shape[0] // 2 - 1)
    batch = place(method, tally, sums, known=known)
    charged = method.charged(state, batch)
    return None if charged is None else charged * per_token(batch, read(tally.scale))


def count_and_charge(
    real: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    gate: Gate,
    mask: Bool[Tensor, "T"] | None,
    method: Method,
    state: State,
    tally: Tally,
) -> Float[Tensor, "T E"] | None:
    """Count a batch of a method `from_sums`, and differentiate its charge by the affinities.

    Args:
        real: (T, E) affinities, 0 in padded rows.
        experts: (T, K), the choice.
        gate: how scores come from affinities.
        mask: (T,) True for real tokens, or None.
        method: the method.
        state: the method's.
        tally: the layer's.

    Returns:
        (T, E), in padded rows whatever it may be, and perhaps one row seen T times; None for a
        method that charges nothing.
    """
    row_scale = gate.row_scale(real)
    packed = _count(real, row_scale, experts, mask)
    charge = settle(method, state, tally, packed, known=real_tokens(len(experts), mask))
    return None if charge is None else gate.charge(charge, real, row_scale)


def real_tokens(rows: int, mask: Tensor | None) -> int | None:
    """Number of real tokens, at least 1, if the host knows it."""
    # A compiler would take it for a constant, or for a symbol that it must guard.
    return None if mask is not None or torch.compiler.is_compiling() else max(rows, 1)


def packed_size(method: Method, num_experts: int) -> int:
    """Length of the packed sums: scores E, counts E, tokens, batches, then the method's own."""
    return 2 * num_experts + 2 + sum(_extra_sizes(method, num_experts))


def pack(sums: Sums) -> Float[Tensor, "sums"]:
    """Lay the sums of one batch end to end, with a 1 that counts the batch."""
    tokens, one = sums.tokens.view(1), sums.tokens.new_ones(1)
    return torch.cat([sums.scores, sums.counts, tokens, one, *(e.view(-1) for e in sums.extra)])


def unpack(packed: Float[Tensor, "*rows sums"], method: Method, num_experts: int) -> Sums:
    """Undo `pack`, of one layer or a row each; the number of batches is at index 2E + 1."""
    shapes = method.extra_shapes(num_experts)
    sizes = [num_experts, num_experts, 1, 1, *_extra_sizes(method, num_experts)]
    scores, counts, tokens, _, *extra = torch.split(packed, sizes, dim=-1)
    rows = packed.shape[:-1]
    return Sums(
        scores,
        counts,
        tokens.squeeze(-1),
        tuple(e.reshape(*rows, *shape) for e, shape in zip(extra, shapes, strict=True)),
    )


def shared_part(method: Method, num_experts: int, *, everything: bool) -> tuple[slice, ...]:
    """Where in the packed sums that lies which ranks must add up, in order.

    Args:
        method: the method, which says what its update reads.
        num_experts: E.
        everything: whether metrics over all ranks are wanted too.
    """
    read = {"scores", "counts"} if everything else method.reads
    tokens = 2 * num_experts
    parts = [slice(tokens, tokens + 1)]
    if "counts" in read:
        parts = [slice(0 if "scores" in read else num_experts, tokens + 1)]
    elif "scores" in read:
        parts = [slice(0, num_experts), *parts]
    if method.extra_shapes(num_experts):
        parts.append(slice(tokens + 2, None))
    return tuple(parts)


def _count(
    real: Float[Tensor, "T E"],
    row_scale: Float[Tensor, "T"] | None,
    experts: Int[Tensor, "T K"],
    mask: Bool[Tensor, "T"] | None,
) -> Float[Tensor, "sums"]:
    """`routing.add_up` of scores that need not be formed, each sum written where it lies."""
    rows, num_experts = real.shape
    packed = real.new_zeros(2 * num_experts + 2)
    scores, counts, tokens, one = torch.split(packed, [num_experts, num_experts, 1, 1])
    one.fill_(1)
    if row_scale is None:
        torch.sum(real, dim=0, out=scores)
    else:
        torch.mv(real.t(), row_scale, out=scores)
    # A single 1 is expanded rather than allocated for every choice.
    ones = one.expand(experts.numel())
    if mask is None:
        tokens.fill_(rows)
    else:
        tokens.copy_(mask.sum())
        ones = mask.to(real.dtype).unsqueeze(-1).expand_as(experts).reshape(-1)
    counts.scatter_add_(0, experts.reshape(-1), ones)
    return packed


def _extra_sizes(method: Method, num_experts: int) -> list[int]:
    return [torch.Size(shape).numel() for shape in method.extra_shapes(num_experts)]


def _share(tokens: Tensor, known: int | None, last_step: Tensor) -> float | Tensor:
    """This batch's share of its step, judged by the last step; 1 where steps are one batch."""
    last_tokens, last_batches = read(last_step)
    expected = last_tokens * (last_batches > 1)
    if known is not None and isinstance(expected, float):
        return known / max(known, expected)
    # clamp to 1: a batch without a token has no share, not 0/0.
    return tokens / tokens.clamp(min=expected).clamp(min=1)
