"""The node that counts a batch and charges its price, in the backward pass and nowhere else.

An identity on one of the router's outputs is put into the graph. When the gradient comes back
through it, the router's logits are still at hand: the batch is counted, the price formed, and

    dL/dz ← scale · weight · ∂penalty/∂z

handed to the logits beside whatever the task sends. Backward runs exactly once per batch in plain
training, under both kinds of activation checkpointing and under torch.compile, whereas forward may
run twice or under no_grad; hence a batch is counted once, and evaluation never. (Asking for the
same backward twice, with `retain_graph`, counts twice.) Kept for backward are the logits and the
choice, and none of the penalty's own graph. On a GPU a method whose price is formed `from_sums`
takes two fused passes over the logits (`kernels`).

`scale` is the gradient that the trainer put on the task loss (gradient scaler, accumulation, world
size), read by `follow`, so that a strength means the same under all of them.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance import kernels
from moebalance.core.tally import Tally, count_and_charge, pack, place, real_tokens, settle
from moebalance.gates import Gate
from moebalance.methods.base import Method, State, read
from moebalance.routing import real_rows, route

Backward = Callable[..., tuple[Tensor | None, ...]]


def exactly(backward: Backward) -> Backward:
    """Run a backward without recording it, and without the autocast of whoever called it.

    A forward is meant to end its autocast region before the loss goes back, but not every loop does
    so, and sums and prices are float32.
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


def inject(
    carrier: Tensor,
    *,
    logits: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    mask: Bool[Tensor, "T"] | None,
    sequences: int,
    weight: Float[Tensor, ""] | None,
    method: Method,
    gate: Gate,
    state: State,
    tally: Tally,
    fused: bool = True,
) -> Tensor:
    """Return `carrier` unchanged, tied to a backward that counts this batch and charges it.

    Args:
        carrier: a differentiable output of the router that the loss depends on.
        logits: (T, E), to receive the gradient of the penalty.
        experts: (T, K), the chosen experts.
        mask: (T,) True for real tokens, or None.
        sequences: number of sequences the tokens are laid out in.
        weight: this batch's weight in the mean over its step; None for 1.
        method: the method.
        gate: how scores come from logits.
        state: the method's state, constant during a step.
        tally: tensors that the backward pass reads and writes.
        fused: whether to take the fused kernels where they run.
    """
    fits = fused and method.from_sums and kernels.supported(logits, gate, experts.shape[-1])
    static = (method, gate, sequences, fits)
    node = _InjectSums if method.from_sums else _Inject
    carried: Tensor = node.apply(  # type: ignore[no-untyped-call]
        static, state, tally, mask, weight, experts, logits, carrier
    )
    return carried


def follow(loss: Float[Tensor, ""], scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return `loss` unchanged, and write the gradient it receives into `scale`."""
    followed: Tensor = _Follow.apply(loss, scale)  # type: ignore[no-untyped-call]
    return followed


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        static: tuple[Method, Gate, int, bool],
        state: State,
        tally: Tally,
        mask: Tensor | None,
        weight: Tensor | None,
        experts: Tensor,
        logits: Tensor,
        carrier: Tensor,
    ) -> Tensor:
        ctx.static = static
        # State and tally change in place after this; autograd's version check is not for them.
        ctx.state, ctx.tally = state, tally
        ctx.save_for_backward(logits, experts, mask, weight)
        # A clone, not a view: models scale these weights in place.
        return carrier.clone()

    @staticmethod
    @exactly
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        logits, experts, mask, weight = ctx.saved_tensors
        method, gate, sequences, _ = ctx.static
        routing = route(logits, experts, gate, mask=mask, sequences=sequences)
        sums = method.observe(ctx.state, routing)
        ctx.tally.running.add_(pack(sums))
        known = real_tokens(len(logits), mask)
        batch = place(method, ctx.tally, sums, known=known, routing=routing)
        scale = read(ctx.tally.weighed(weight).scale)
        charge = method.logit_gradient(ctx.state, batch, scale)
        charge = None if charge is None else charge.to(logits.dtype)
        return None, None, None, None, None, None, charge, upstream


class _InjectSums(_Inject):
    @staticmethod
    @exactly
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        logits, experts, mask, weight = ctx.saved_tensors
        method, gate, _, fused = ctx.static
        tally, gradient = ctx.tally.weighed(weight), None
        if fused:
            packed = kernels.count(logits, experts, gate, mask=mask)
            known = real_tokens(len(logits), mask)
            charge = settle(method, ctx.state, tally, packed, known=known, fused=True)
            if charge is not None:
                gradient = kernels.pull(logits, gate, charge, mask=mask)
        else:
            real = real_rows(gate.affinities(logits), mask)
            charge = count_and_charge(real, experts, gate, mask, method, ctx.state, tally)
            if charge is not None:
                gradient = gate.backward(charge, real).to(logits.dtype)
        return None, None, None, None, None, None, gradient, upstream


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        # A clone, not a view: trainers scale the loss they are given in place.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        # An exact zero says that the trainer made its own loss (DDP sends one to unused outputs).
        ctx.scale.copy_(torch.where(gradient == 0, ctx.scale, gradient.to(ctx.scale.dtype)))
        return gradient, None
