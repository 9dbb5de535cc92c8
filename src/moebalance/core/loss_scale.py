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
    loss: Float[Tensor, ""], scale: Float[Tensor, ""], factor: float = 1.0
) -> Float[Tensor, ""]:
    """Return `loss` unchanged, and write the gradient that it receives, by `factor`, into `scale`.

    So a strength means the same under a gradient scaler, accumulation and any world size.
    """
    followed: Tensor = _Follow.apply(loss, scale, factor)  # type: ignore[no-untyped-call]
    return followed


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor, factor: float) -> Tensor:
        ctx.scale, ctx.factor = scale, factor
        # A clone, not a view: trainers scale the loss they are given in place.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        # An exact zero says that the trainer made its own loss (DDP sends one to unused outputs).
        found = gradient.to(ctx.scale.dtype)
        if ctx.factor != 1:
            found = found * ctx.factor
        ctx.scale.copy_(torch.where(gradient == 0, ctx.scale, found))
        return gradient, None, None
