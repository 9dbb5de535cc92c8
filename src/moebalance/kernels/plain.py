"""The fused router in plain torch: `router.choose` computes the same in one pass.

    r = a(z) − price (T, E), or log a(z) − price for a price in nats,
    experts (T, K) = top-k of r (in the kept groups),
    normaliser (T,) = log Σ_e exp ℓ(z_e),   packed (2E + 2,) = [Σ_t p_t, counts, tokens, 1].

Autograd of ⟨g, weights⟩ + ⟨q, packed[:E]⟩ through this function is `router.pull_back` with upstream
g (T, K) and charge q (E,).

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.gates import Gate, GroupLimit, Sigmoid, at_least_float32, untied
from moebalance.routing import real_rows


class Chosen(NamedTuple):
    """The results of one pass over the logits.

    Attributes:
        weights: (T, K) in the logits' dtype; differentiable in the plain form.
        experts: (T, K) int64, best first; among equals the lowest index first.
        normaliser: (T,) log Σ_e exp ℓ(z_e), with ℓ = z for softmax and log σ(z) for sigmoid; kept
            for the backward pass.
        packed: (2E + 2,) scores Σ_t p_t, counts, tokens and a 1 that counts the batch. A layer
            packs the sums of a method without extra sums in the same order.
    """

    weights: Float[Tensor, "T K"]
    experts: Int[Tensor, "T K"]
    normaliser: Float[Tensor, "T"]
    packed: Float[Tensor, "sums"]


def choose(
    logits: Float[Tensor, "T E"],
    gate: Gate,
    top_k: int,
    *,
    normalize: bool,
    price: Float[Tensor, "E"] | None = None,
    in_nats: bool = False,
    limit: GroupLimit | None = None,
    mask: Bool[Tensor, "T"] | None = None,
) -> Chosen:
    """Choose experts, weigh them and sum what was done; see `router.choose`."""
    scores = gate.scores(logits)
    experts = ranking(logits.detach(), gate, price, limit, in_nats=in_nats)[:, :top_k]
    weights = (
        gate.log_affinity(logits.gather(-1, experts)).softmax(dim=-1)
        if normalize
        else gate.affinities(logits).gather(-1, experts)
    )
    real = logits.new_ones(logits.shape[0], dtype=torch.bool) if mask is None else mask
    chosen = torch.zeros_like(scores).scatter(-1, experts, 1.0)
    tokens = real.sum().to(scores.dtype)
    sums = [real_rows(scores, real).sum(dim=0), real_rows(chosen, real).sum(dim=0)]
    packed = torch.cat([*sums, torch.stack([tokens, torch.ones_like(tokens)])])
    return Chosen(weights.to(logits.dtype), experts, _normaliser(logits, gate), packed)


def pull(
    logits: Float[Tensor, "T E"],
    gate: Gate,
    charge: Float[Tensor, "E"],
    *,
    mask: Bool[Tensor, "T"] | None = None,
) -> Float[Tensor, "T E"]:
    """Gradient of the logits of a charge on their scores; see `attached.pull`."""
    real = real_rows(gate.affinities(logits), mask)
    return gate.backward(gate.price_gradient(charge, real, gate.row_scale(real)), real)


def ranking(
    logits: Float[Tensor, "T E"],
    gate: Gate,
    price: Float[Tensor, "E"] | None,
    limit: GroupLimit | None,
    *,
    in_nats: bool = False,
) -> Int[Tensor, "T E"]:
    """All experts (T, E), best first, NaN above all.

    Of equals the larger logit is first, then the lowest index.
    """
    if limit is not None and not limit.narrows:
        limit = None
    if price is None and limit is None:
        # Affinities grow with the logits, and logits do not underflow.
        return logits.argsort(dim=-1, descending=True, stable=True)
    scores = gate.log_affinity(logits) if in_nats else gate.affinities(logits)
    ranks = untied(scores if price is None else scores - price, logits)
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    if limit is None:
        return order
    size = ranks.shape[-1] // limit.groups
    grouped = ranks.view(len(ranks), limit.groups, size).sort(dim=-1, descending=True).values
    best = grouped[..., : limit.best].sum(dim=-1).argsort(dim=-1, descending=True, stable=True)
    is_open = torch.zeros_like(best).scatter(-1, best[:, : limit.top_groups], 1)
    is_open = is_open.repeat_interleave(size, dim=-1).gather(-1, order)
    return order.gather(-1, is_open.argsort(dim=-1, descending=True, stable=True))


def _normaliser(logits: Float[Tensor, "T E"], gate: Gate) -> Float[Tensor, "T"]:
    z = at_least_float32(logits)
    return (gate.log_affinity(z) if isinstance(gate, Sigmoid) else z).logsumexp(dim=-1)
