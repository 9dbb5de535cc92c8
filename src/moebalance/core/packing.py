"""How a layer's sums of a step lie in one vector, so that ranks add them up in one message.

packed = [scores E | counts E | tokens 1 | batches 1 | the method's own sums]
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method
from moebalance.routing import Sums, split


def packed_size(method: Method, num_experts: int) -> int:
    """Length of the packed sums."""
    return 2 * num_experts + 2 + sum(_extra_sizes(method, num_experts))


def pack(sums: Sums) -> Float[Tensor, "sums"]:
    """Lay the sums of one batch end to end, with a 1 that counts the batch."""
    tokens, one = sums.tokens.view(1), sums.tokens.new_ones(1)
    return torch.cat([sums.scores, sums.counts, tokens, one, *(e.view(-1) for e in sums.extra)])


def unpack(packed: Float[Tensor, "*rows sums"], method: Method, num_experts: int) -> Sums:
    """Undo `pack`, for one layer or a row each. The number of batches is at index 2E + 1."""
    sums = split(packed, num_experts)
    shapes = method.extra_shapes(num_experts)
    if len(shapes) == 0:  # Dynamo traces no `not` of a tuple
        return sums
    parts = torch.split(
        packed[..., 2 * num_experts + 2 :], _extra_sizes(method, num_experts), dim=-1
    )
    rows = packed.shape[:-1]
    extra = (part.reshape(*rows, *shape) for part, shape in zip(parts, shapes, strict=True))
    return sums._replace(extra=tuple(extra))


def shared_part(method: Method, num_experts: int, *, everything: bool) -> tuple[slice, ...]:
    """The slices of the packed sums that ranks must add up, in order.

    Args:
        method: its traits say what its update reads.
        num_experts: E.
        everything: whether metrics over all ranks are wanted too.
    """
    shared = {"scores", "counts"} if everything else method.traits.shared
    tokens = 2 * num_experts
    parts = [slice(tokens, tokens + 1)]
    if "counts" in shared:
        parts = [slice(0 if "scores" in shared else num_experts, tokens + 1)]
    elif "scores" in shared:
        parts = [slice(0, num_experts), *parts]
    if method.extra_shapes(num_experts):
        parts.append(slice(tokens + 2, None))
    return tuple(parts)


def _extra_sizes(method: Method, num_experts: int) -> list[int]:
    return [torch.Size(shape).numel() for shape in method.extra_shapes(num_experts)]
