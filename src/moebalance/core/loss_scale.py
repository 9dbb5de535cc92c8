"""How strongly a loss counts: the gradient that it receives, read as it comes by.

A trainer divides a loss by the micro-batches of a step, and a gradient scaler multiplies it. The
balancing term has to follow, or a strength would mean something else in every training loop.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def follow(
    loss: Float[Tensor, ""],
    scale: Float[Tensor, ""],
    factor: float = 1.0,
    *,
    optional: bool = False,
) -> Float[Tensor, ""]:
    """Return `loss` unchanged, and write the gradient that it receives, by `factor`, into `scale`.

    So a strength means the same under a gradient scaler, accumulation and any world size. If the
    loss is `optional`, a gradient of exactly 0 is not written.
    """
    followed: Tensor = _Follow.apply(loss, scale, factor, optional)  # type: ignore[no-untyped-call]
    return followed


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor, factor: float, optional: bool) -> Tensor:
        ctx.scale, ctx.factor, ctx.optional = scale, factor, optional
        # A clone, not a view: trainers scale the loss they are given in place.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        found = gradient.to(ctx.scale.dtype)
        if ctx.factor != 1:
            found = found * ctx.factor
        if ctx.optional:
            # An exact zero says that another loss is trained: DDP sends one to unused outputs.
            found = torch.where(gradient == 0, ctx.scale, found)
        ctx.scale.copy_(found)
        return gradient, None, None, None
