"""The path of one batch: choose, count, charge, and give the gradient back.

T tokens, E experts, K chosen experts per token.

    forward   choose   z (T,E) → affinities a(z) (T,E), experts = top-k of a − price (T,K),
                       weights a_e or a_e / Σ_chosen a (T,K)            a router of ours
              tie      an identity on one output of a router            a router of another's
    backward  count    running += (Σ_t p_t, counts, tokens, 1, the method's own sums)
              price    q (E,) from the sums, times scale · E / tokens
              charge   ∂/∂a = (q − ⟨p, q⟩) / Σ a (T,E), plus the task's gradient at the K places
              gate     ∂/∂z (T,E)

A batch is counted in backward and nowhere else. Backward runs once per batch in plain training,
under both kinds of activation checkpointing and under torch.compile, but forward may run twice. So
a batch is counted once, and evaluation never. (A second backward over the same graph counts twice.)

A method whose price comes `from_sums` is charged from the affinities, whose gradient starts as the
charge instead of zeros. This keeps nothing more for backward than a bare router does. On a GPU it
is one fused pass each way (`moebalance.kernels`). Other methods go through `_from_routing`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance import kernels
from moebalance.core.exact import exactly, once
from moebalance.core.packing import unpack
from moebalance.gates import Gate, GroupLimit, best, normalized
from moebalance.methods.base import Method, State, Traits, per_token, price_in_force, under_price
from moebalance.routing import Batch, Routing, Sums, as_number, count, real_rows, route


class Tally(NamedTuple):
    """The tensors that a layer's backward pass reads and writes.

    Attributes:
        running: packed sums of the step so far (`core.packing`); added to in place.
        last_step: (2,) tokens and batches of the last finished step.
        scale: () gradient of the total loss with respect to the task loss.
        replayed: () 1 once a batch of this step was routed by choices from elsewhere.
        tickets: counters of the fused kernels, for one launch at a time; None makes them anew.
    """

    running: Float[Tensor, "sums"]
    last_step: Float[Tensor, "2"]
    scale: Float[Tensor, ""]
    replayed: Float[Tensor, ""]
    tickets: Int[Tensor, "counters"] | None = None


class Pass(NamedTuple):
    """What stays the same from batch to batch.

    Attributes:
        method: the method.
        traits: its traits.
        gate: affinities from logits.
        state: the method's state, constant during a step.
        tally: tensors that the backward pass reads and writes.
        fused: whether to take the fused kernels if they can run.
        top_k: K.
        normalize: whether a router of ours divides a token's weights by their sum.
        limit: the groups of experts that a router of ours may choose from; None for all experts.
        ordered: whether a router of ours ranks by affinity alone and names a token's experts from
            the best to the worst, as the router does that it stands in for.
        dtype: of the weights that the fused kernels write; None for the logits' own.
        sequences: number of sequences in which the tokens lie.
        replayed: whether the choice came from elsewhere.
        weight: this batch's weight in the mean over its step, (); None for 1.
    """

    method: Method
    traits: Traits
    gate: Gate
    state: State
    tally: Tally
    fused: bool = True
    top_k: int = 0
    normalize: bool = False
    limit: GroupLimit | None = None
    ordered: bool = False
    dtype: torch.dtype | None = None
    sequences: int = 1
    replayed: bool = False
    weight: Tensor | None = None

    def begun(self) -> Pass:
        """For a backward: the choice of a replay is noted, and the batch has its weight."""
        if self.replayed:
            self.tally.replayed.fill_(1)
        if self.weight is None:
            return self
        return self._replace(tally=self.tally._replace(scale=self.tally.scale * self.weight))


def choose(
    logits: Float[Tensor, "T E"],
    how: Pass,
    *,
    preference: Float[Tensor, "T E"] | None = None,
    mask: Bool[Tensor, "T"] | None = None,
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """Weights of the chosen experts, tied to counting and charging, and the choice, in any order.

    Args:
        logits: (T, E), requires grad.
        how: the router, with a method whose price comes `from_sums`.
        preference: (T, E) for top-k to rank; None for the affinities less the method's price.
        mask: (T,) True for real tokens, or None.
    """
    fits = how.fused and preference is None and kernels.supported(logits, how.gate, how.top_k)
    node, how = (_ChooseFused if fits else _Choose), how._replace(fused=fits)
    weights, experts = node.apply(how, preference, mask, logits)  # type: ignore[no-untyped-call]
    return weights, experts


def tie(
    carrier: Tensor,
    how: Pass,
    *,
    logits: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    mask: Bool[Tensor, "T"] | None = None,
) -> Tensor:
    """Return `carrier` unchanged, tied to a backward that counts this batch and charges it.

    Args:
        carrier: a differentiable output of the router that the loss depends on.
        how: the layer and its method.
        logits: (T, E), which receive the gradient of the penalty.
        experts: (T, K), the choice.
        mask: (T,) True for real tokens, or None.
    """
    if torch.compiler.is_compiling():  # which traces no function of the same tensor twice
        carrier = carrier.view_as(carrier)
    fits = how.fused and how.traits.from_sums
    how = how._replace(fused=fits and kernels.supported(logits, how.gate, experts.shape[-1]))
    tied: Tensor = _Tie.apply(how, mask, experts, logits, carrier)  # type: ignore[no-untyped-call]
    return tied


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Pass, preference: Tensor | None, mask: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        affinities = how.gate.affinities(logits)  # (T,E)
        if how.ordered:
            weights, experts = affinities.topk(how.top_k, dim=-1)  # (T,K)
        else:
            order = preference
            if order is None:
                about = (how.method, how.state, how.gate, logits.detach(), affinities)
                order = under_price(*about, summed=how.limit is not None)
            weights, experts = best(logits, affinities, order, how.top_k, how.limit)
        total = None
        if how.normalize:
            weights, total = normalized(weights)
        # State and tally change in place after this; autograd's version check is not for them.
        ctx.how, ctx.dtype = how, logits.dtype
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)  # or zeros are made for the choice
        ctx.save_for_backward(affinities, experts, mask, weights if how.normalize else None, total)
        # A copy: what is kept for backward may not change, and models scale weights in place.
        return weights.clone() if how.normalize else weights, experts

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        affinities, experts, mask, weights, total = ctx.saved_tensors
        upstream = _given(gradients[0], experts, affinities)  # (T,K)
        how = ctx.how.begun()
        charge = _from_affinities(how, real_rows(affinities, mask), experts, mask)
        if charge is None:
            gradient = torch.zeros_like(affinities)
        else:
            # No view of one row, for the task's gradient is added to it.
            gradient = real_rows(charge, mask).contiguous()
        if weights is not None:
            # In the order of autograd's division, so that the task's part is the same in all bits.
            drawn = (upstream * (weights / total)).sum(dim=-1, keepdim=True)
            upstream = upstream / total - drawn
        gradient.scatter_add_(-1, experts, upstream.to(gradient.dtype))
        return None, None, None, how.gate.backward_over(gradient, affinities).to(ctx.dtype)


class _ChooseFused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Pass, preference: None, mask: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        price, in_nats = price_in_force(how.method, how.state)
        found = kernels.choose(
            logits,
            how.gate,
            how.top_k,
            normalize=how.normalize,
            price=price,
            in_nats=in_nats,
            limit=how.limit,
            mask=mask,
            dtype=how.dtype,
            tickets=how.tally.tickets,
        )
        # The sums are here already, but a batch is counted in backward: forward may run twice.
        ctx.how, ctx.packed = how, found.packed
        ctx.mark_non_differentiable(found.experts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, found.experts, found.normaliser, mask)
        return found.weights, found.experts

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, experts, normaliser, mask = ctx.saved_tensors
        how = ctx.how.begun()
        gradient = kernels.pull_back(
            _given(gradients[0], experts, logits),
            logits,
            experts,
            normaliser,
            how.gate,
            normalize=how.normalize,
            charge=_in_kernel(how, ctx.packed, len(experts), mask),
            mask=mask,
        )
        return None, None, None, gradient


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: Pass,
        mask: Tensor | None,
        experts: Tensor,
        logits: Tensor,
        carrier: Tensor,
    ) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(logits, experts, mask)
        # A clone, not a view: models scale these weights in place.
        return carrier.clone()

    @staticmethod
    @exactly
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, experts, mask = ctx.saved_tensors
        how = ctx.how.begun()
        if not how.traits.from_sums:
            gradient = _from_routing(how, logits, experts, mask)
        elif how.fused:
            packed = kernels.count(logits, experts, how.gate, mask=mask, tickets=how.tally.tickets)
            form = _in_kernel if how.traits.charges else settle  # what charges nothing has no pass
            charge = form(how, packed, len(logits), mask)
            gradient = None if charge is None else kernels.pull(logits, how.gate, charge, mask=mask)
        else:
            real = real_rows(how.gate.affinities(logits), mask)
            gradient = _from_affinities(how, real, experts, mask)
            if gradient is not None:
                gradient = how.gate.backward(gradient, real)
        gradient = None if gradient is None else gradient.to(logits.dtype)
        return None, None, None, gradient, gradients[0]


def _from_affinities(
    how: Pass, real: Float[Tensor, "T E"], experts: Int[Tensor, "T K"], mask: Tensor | None
) -> Float[Tensor, "T E"] | None:
    """Count a batch and charge it from its affinities (0 in padded rows).

    Returns the gradient of the affinities: arbitrary in padded rows, perhaps one row expanded.
    """
    row_scale = how.gate.row_scale(real)
    packed, sums = count(real, row_scale, experts, mask)
    charge = settle(how, packed, len(experts), mask, sums)
    return None if charge is None else how.gate.price_gradient(charge, real, row_scale)


def _from_routing(
    how: Pass, logits: Float[Tensor, "T E"], experts: Int[Tensor, "T K"], mask: Tensor | None
) -> Float[Tensor, "T E"] | None:
    """Count a batch and charge it for a method that reads more than sums."""
    routing = route(logits, experts, how.gate, mask=mask, sequences=how.sequences)
    packed, sums = count(real_rows(routing.scores, mask), None, experts, mask)
    extra = how.method.extra(how.state, routing)
    if extra:
        packed = torch.cat([packed, *(part.reshape(-1) for part in extra)])
    how.tally.running.add_(packed)
    batch = _placed(how, sums._replace(extra=extra), _known(len(logits), mask), routing)
    return how.method.penalty_gradient(how.state, batch, as_number(how.tally.scale))


def settle(
    how: Pass,
    packed: Float[Tensor, "sums"],
    rows: int,
    mask: Tensor | None,
    sums: Sums | None = None,
) -> Float[Tensor, "E"] | None:
    """Add a batch to its step; return the gradient of the loss with respect to any token's scores.

    The one place where torch forms a price from sums. `sums` are views of `packed`, if at hand.
    """
    how.tally.running.add_(packed)
    if not how.traits.charges:
        return None
    if sums is None:
        sums = unpack(packed, how.method, packed.shape[0] // 2 - 1)
    batch = _placed(how, sums, _known(rows, mask), None)
    price = how.method.loss_price(how.state, batch)
    return None if price is None else price * per_token(batch, as_number(how.tally.scale))


def _in_kernel(
    how: Pass, packed: Float[Tensor, "sums"], rows: int, mask: Tensor | None
) -> Float[Tensor, "E"] | kernels.Settlement | None:
    """As `settle`, but left to the launch that writes the gradient if a program can do it."""
    price = kernels.mean_price(how.method, how.state) if how.traits.charges else None
    if kernels.forms(price) or not how.traits.charges:
        return kernels.Settlement(price, packed, *how.tally[:3])
    return settle(how, packed, rows, mask)


def _placed(how: Pass, sums: Sums, known: int | None, routing: Routing | None) -> Batch:
    """A batch, counted already, with its place in the step."""
    step, coupling = sums, how.traits.coupling
    fraction: float | Tensor = 1.0
    if coupling == "step":
        step = unpack(how.tally.running, how.method, sums.scores.shape[-1])
    if coupling in ("batch", "step"):
        fraction = _fraction(sums.tokens, known, how.tally.last_step)
    return Batch(routing, sums, step, fraction, known)  # type: ignore[arg-type]


def _fraction(tokens: Tensor, known: int | None, last_step: Tensor) -> float | Tensor:
    """A batch's part of its step, judged by the last step; 1 if steps are one batch."""
    last_tokens, last_batches = as_number(last_step)
    expected = last_tokens * (last_batches > 1)
    if known is not None and isinstance(expected, float):
        return known / max(known, expected)
    # clamp to 1: a batch without a token has no part, not 0/0.
    return tokens / tokens.clamp(min=expected).clamp(min=1)


def _known(rows: int, mask: Tensor | None) -> int | None:
    """Number of real tokens, at least 1, if the host knows it."""
    # A compiler would take it for a constant, or for a symbol that it must guard.
    return None if mask is not None or torch.compiler.is_compiling() else max(rows, 1)


def _given(upstream: Tensor | None, experts: Tensor, like: Tensor) -> Tensor:
    """Gradient of the weights; zeros if the function downstream sends none."""
    return like.new_zeros(experts.shape) if upstream is None else upstream
