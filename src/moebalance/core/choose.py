"""The pass of a router that is ours: choose, weigh, count and charge in one autograd node.

    forward   affinities a(z), experts = top-k of a − price, weights a_e or a_e / Σ_chosen a
    backward  the batch is counted, its price q formed from the sums, and
              ∂/∂a  ←  q's pull on p = a / Σa, plus the task's gradient at the K chosen places

The gradient of the affinities begins as the charge instead of zeros, so that to a bare router this
adds one read of the scores and one of the choice, and keeps nothing more for backward. On a GPU the
same is one fused pass each way that keeps the logits alone, and for φ one launch between the two
that counts the batch and forms its price (`kernels`).

For methods whose price is formed `from_sums`; others go through `inject`, as foreign routers do.
A second derivative (`create_graph`) does not go through the node.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance import kernels
from moebalance.core.inject import exactly
from moebalance.core.tally import Tally, count_and_charge, real_tokens, settle
from moebalance.gates import Gate, GroupLimit
from moebalance.methods.base import Method, State
from moebalance.routing import real_rows

_SMALL = 1e-20  # the derivative of what it clamps, an affinity below it, is smaller still


class Pass(NamedTuple):
    """What stays the same from batch to batch.

    Attributes:
        method: the method.
        gate: affinities from logits.
        top_k: K.
        normalize: whether a token's weights, its experts' affinities, are divided by their sum.
        state: the method's state, constant during a step.
        tally: tensors that the backward pass reads and writes.
        fused: whether to take the fused kernels where they run.
        limit: the groups that a token may choose from; None for all experts.
    """

    method: Method
    gate: Gate
    top_k: int
    normalize: bool
    state: State
    tally: Tally
    fused: bool = True
    limit: GroupLimit | None = None


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
        how: the router and its method.
        preference: (T, E), what top-k ranks; None for the affinities less the method's price.
        mask: (T,) True for real tokens, or None.
    """
    fits = how.fused and preference is None and kernels.supported(logits, how.gate, how.top_k)
    node = _Fused if fits else _Plain
    weights, experts = node.apply(how, preference, mask, logits)  # type: ignore[no-untyped-call]
    return weights, experts


def best(
    affinities: Float[Tensor, "T E"],
    preference: Float[Tensor, "T E"] | None,
    price: Float[Tensor, "E"] | None,
    top_k: int,
    limit: GroupLimit | None = None,
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """The K best by preference, else by affinity less price: their affinities and their indices.

    In no order, which would take time and which a mixture of experts has no use for.
    """
    if preference is None and price is None and limit is None:
        chosen, experts = affinities.topk(top_k, dim=-1, sorted=False)
        return chosen, experts
    ranked = preference
    if ranked is None:
        ranked = affinities if price is None else affinities - price
    if limit is not None:
        ranked = limit.within(ranked)
    experts = ranked.topk(top_k, dim=-1, sorted=False).indices
    return affinities.gather(-1, experts), experts


def shares(
    chosen: Float[Tensor, "T K"],
) -> tuple[Float[Tensor, "T K"], Float[Tensor, "T 1"]]:
    """Each row divided by its sum, and the sum."""
    # clamp: a price may choose experts whose affinities all underflowed.
    total = chosen.sum(dim=-1, keepdim=True).clamp(min=_SMALL)
    return chosen / total, total


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Pass, preference: Tensor | None, mask: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        affinities = how.gate.affinities(logits)
        price = how.method.price(how.state)
        weights, experts = best(affinities, preference, price, how.top_k, how.limit)
        total = None
        if how.normalize:
            weights, total = shares(weights)
        # State and tally change in place after this; autograd's version check is not for them.
        ctx.how, ctx.dtype = how, logits.dtype
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)  # or zeros are made for the choice
        ctx.save_for_backward(affinities, experts, mask, weights if how.normalize else None, total)
        # A copy, for what is kept for backward may not change, and models scale weights in place.
        return weights.clone() if how.normalize else weights, experts

    @staticmethod
    @exactly
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        affinities, experts, mask, weights, total = ctx.saved_tensors
        upstream = _given(gradients[0], experts, affinities)
        how = ctx.how
        real = real_rows(affinities, mask)
        charge = count_and_charge(real, experts, how.gate, mask, how.method, how.state, how.tally)
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
        return None, None, None, how.gate.backward(gradient, affinities).to(ctx.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Pass, preference: None, mask: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = kernels.choose(
            logits,
            how.gate,
            how.top_k,
            normalize=how.normalize,
            price=how.method.price(how.state),
            limit=how.limit,
            mask=mask,
        )
        # The sums are here already, but a batch is counted in backward: forward may run twice.
        ctx.how, ctx.packed = how, found.packed
        ctx.mark_non_differentiable(found.experts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, found.experts, found.normaliser, mask)
        return found.weights, found.experts

    @staticmethod
    @exactly
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, experts, normaliser, mask = ctx.saved_tensors
        upstream = _given(gradients[0], experts, logits)
        how = ctx.how
        known = real_tokens(len(experts), mask)
        charge = settle(how.method, how.state, how.tally, ctx.packed, known=known, fused=True)
        gradient = kernels.pull_back(
            upstream,
            logits,
            experts,
            normaliser,
            how.gate,
            normalize=how.normalize,
            charge=charge,
            mask=mask,
        )
        return None, None, None, gradient


def _given(upstream: Tensor | None, experts: Tensor, like: Tensor) -> Tensor:
    """Gradient of the weights; zeros from a function downstream that sends none."""
    return like.new_zeros(experts.shape) if upstream is None else upstream
