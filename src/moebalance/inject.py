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
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance import kernels
from moebalance.balancers.base import Balancer, State, per_token, read
from moebalance.routing import Batch, Gate, Sums, route

Backward = Callable[..., tuple[Tensor | None, ...]]


def exactly(backward: Backward) -> Backward:
    """Run a backward without recording it, and without the autocast of whoever called it.

    A forward is meant to end its autocast region before the loss goes back, but not every loop does
    so, and sums and prices are float32.
    """

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        device = gradients[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return backward(ctx, *gradients)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return backward(ctx, *gradients)
        return backward(ctx, *gradients)

    return run


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


def inject(
    carrier: Tensor,
    *,
    logits: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    mask: Bool[Tensor, "T"] | None,
    sequences: int,
    weight: Float[Tensor, ""] | None,
    balancer: Balancer,
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
        balancer: the method.
        gate: how scores come from logits.
        state: the method's state, constant during a step.
        tally: tensors that the backward pass reads and writes.
        fused: whether to take the fused kernels where they run.
    """
    static = (balancer, gate, sequences)
    fits = fused and balancer.from_sums and kernels.supported(logits, gate, experts.shape[-1])
    node = _InjectFused if fits else _Inject
    carried: Tensor = node.apply(  # type: ignore[no-untyped-call]
        static, state, tally, mask, weight, experts, logits, carrier
    )
    return carried


def follow(loss: Float[Tensor, ""], scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return `loss` unchanged, and write the gradient it receives into `scale`."""
    followed: Tensor = _Follow.apply(loss, scale)  # type: ignore[no-untyped-call]
    return followed


def place(
    balancer: Balancer, tally: Tally, sums: Sums, *, known: int | None, routing: Any = None
) -> Batch:
    """Say what the place of a batch, counted already, is in its step.

    Args:
        balancer: the method.
        tally: the layer's.
        sums: of the batch.
        known: number of its tokens, if the host knows it.
        routing: that of the batch, or None for a method that reads sums alone.
    """
    # What a method couples is all of its surroundings that it may look at.
    step, coupling = sums, balancer.coupling
    share: float | Tensor = 1.0
    if coupling == "step":
        step = unpack(tally.running, balancer, sums.scores.shape[-1])
    if coupling in ("batch", "step"):
        share = _share(sums.tokens, known, tally.last_step)
    return Batch(routing, sums, step, share, known)


def settle(
    balancer: Balancer,
    state: State,
    tally: Tally,
    packed: Float[Tensor, "sums"],
    *,
    known: int | None,
    fused: bool = False,
) -> Float[Tensor, "E"] | None:
    """Add a batch to its step, and say what a token's scores are charged by a method `from_sums`.

    Args:
        balancer: the method.
        state: the method's.
        tally: the layer's.
        packed: sums of the batch.
        known: number of its tokens, if the host knows it.
        fused: whether to do it in one launch where the price has such a form.
    """
    if fused:
        price = balancer.mean_price(state)
        if kernels.forms(price):
            return kernels.charge(price, packed, *tally)
    tally.running.add_(packed)
    if not balancer.charges:
        return None
    sums = unpack(packed, balancer, packed.shape[0] // 2 - 1)
    batch = place(balancer, tally, sums, known=known)
    charged = balancer.charged(state, batch)
    return None if charged is None else charged * per_token(batch, read(tally.scale))


def real_tokens(rows: int, mask: Tensor | None) -> int | None:
    """Number of real tokens, at least 1, if the host knows it."""
    # A compiler would take it for a constant, or for a symbol that it must guard.
    return None if mask is not None or torch.compiler.is_compiling() else max(rows, 1)


def packed_size(balancer: Balancer, num_experts: int) -> int:
    """Length of the packed sums: scores E, counts E, tokens, batches, then the method's own."""
    return 2 * num_experts + 2 + sum(_extra_sizes(balancer, num_experts))


def pack(sums: Sums) -> Float[Tensor, "sums"]:
    """Lay the sums of one batch end to end, with a 1 that counts the batch."""
    tokens, one = sums.tokens.view(1), sums.tokens.new_ones(1)
    return torch.cat([sums.scores, sums.counts, tokens, one, *(e.view(-1) for e in sums.extra)])


def unpack(packed: Float[Tensor, "*rows sums"], balancer: Balancer, num_experts: int) -> Sums:
    """Undo `pack`, of one layer or a row each; the number of batches is at index 2E + 1."""
    shapes = balancer.extra_shapes(num_experts)
    sizes = [num_experts, num_experts, 1, 1, *_extra_sizes(balancer, num_experts)]
    scores, counts, tokens, _, *extra = torch.split(packed, sizes, dim=-1)
    rows = packed.shape[:-1]
    return Sums(
        scores,
        counts,
        tokens.squeeze(-1),
        tuple(e.reshape(*rows, *shape) for e, shape in zip(extra, shapes, strict=True)),
    )


def shared_part(balancer: Balancer, num_experts: int, *, everything: bool) -> tuple[slice, ...]:
    """Where in the packed sums that lies which ranks must add up, in order.

    Args:
        balancer: the method, which says what its update reads.
        num_experts: E.
        everything: whether metrics over all ranks are wanted too.
    """
    read = {"scores", "counts"} if everything else balancer.reads
    tokens = 2 * num_experts
    parts = [slice(tokens, tokens + 1)]
    if "counts" in read:
        parts = [slice(0 if "scores" in read else num_experts, tokens + 1)]
    elif "scores" in read:
        parts = [slice(0, num_experts), *parts]
    if balancer.extra_shapes(num_experts):
        parts.append(slice(tokens + 2, None))
    return tuple(parts)


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        static: tuple[Balancer, Gate, int],
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
        balancer, gate, sequences = ctx.static
        routing = route(logits, experts, gate, mask=mask, sequences=sequences)
        sums = balancer.observe(ctx.state, routing)
        ctx.tally.running.add_(pack(sums))
        known = real_tokens(len(logits), mask)
        batch = place(balancer, ctx.tally, sums, known=known, routing=routing)
        scale = read(ctx.tally.scale) if weight is None else ctx.tally.scale * weight
        charge = balancer.logit_gradient(ctx.state, batch, scale)
        charge = None if charge is None else charge.to(logits.dtype)
        return None, None, None, None, None, None, charge, upstream


class _InjectFused(_Inject):
    @staticmethod
    @exactly
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        logits, experts, mask, weight = ctx.saved_tensors
        balancer, gate, _ = ctx.static
        tally = ctx.tally
        if weight is not None:
            tally = tally._replace(scale=tally.scale * weight)
        packed = kernels.count(logits, experts, gate, mask=mask)
        known = real_tokens(len(logits), mask)
        charge = settle(balancer, ctx.state, tally, packed, known=known, fused=True)
        gradient = None
        if charge is not None:
            gradient = kernels.pull(logits, gate, charge, mask=mask)
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


def _extra_sizes(balancer: Balancer, num_experts: int) -> list[int]:
    return [torch.Size(shape).numel() for shape in balancer.extra_shapes(num_experts)]


def _share(tokens: Tensor, known: int | None, last_step: Tensor) -> float | Tensor:
    """This batch's share of its step, judged by the last step; 1 where steps are one batch."""
    last_tokens, last_batches = read(last_step)
    expected = last_tokens * (last_batches > 1)
    if known is not None and isinstance(expected, float):
        return known / max(known, expected)
    # clamp to 1: a batch without a token has no share, not 0/0.
    return tokens / tokens.clamp(min=expected).clamp(min=1)
