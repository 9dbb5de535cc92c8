"""How the backward passes of `autograd.py` run: in full precision, unrecorded, and once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def exactly(backward: Backward) -> Backward:
    """Run a backward without recording it, and without the caller's autocast.

    Sums and prices are float32, and some loops call `loss.backward()` within their autocast region.
    """

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # A context that is not needed takes a microsecond of the host, before a launch that waits.
        given = ctx.saved_tensors[0] if gradients[0] is None else gradients[0]
        device = given.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return backward(ctx, *gradients)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return backward(ctx, *gradients)
        return backward(ctx, *gradients)

    return run


_TWICE = (
    "The choice of a balanced router cannot be differentiated twice: its first gradient is made of "
    "sums that carry no graph. For second derivatives detach() the balancing, or name the routers "
    "by attach(model, method, routers=…), where the router's own graph stays."
)


def once(backward: Backward) -> Backward:
    """As `exactly`, for a gradient that would be wrong if it were differentiated again."""
    exact = exactly(backward)

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = exact(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        # Only under create_graph: an error stands where the graph would go on.
        fail = torch._C._functions.DelayedError(_TWICE, 1)
        return tuple(x if x is None else fail(x.requires_grad_()) for x in found)

    return run
