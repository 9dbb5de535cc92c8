"""The fused router: one pass forward, one pass backward, no (T, E) tensor in between.

    forward   z (T, E) → weights (T, K), experts (T, K), normaliser (T,), packed sums (2E + 2,)
    backward  ∂/∂z of ⟨g, weights⟩ + ⟨q, Σ_t p_t⟩: p ∘ (q − ⟨p, q⟩) ∘ a'(z) plus the weights' part

The forward pass reads the logits. The backward pass reads them again and writes their gradient.
This is three times the logits' bytes, the minimum for a router that keeps only its logits. The sums
exist before the backward pass needs a price, so a price may depend on them.

Each pass is one launch. The second counts the batch and forms its price, if the price is one that
`price.forms` accepts.

Sums are deterministic: each program adds its rows in order into its own row of a small table, and
the last ones to finish sum the table (`sums_program.py`). The number of programs depends on shapes
only, not on the device.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.gates import Gate, GroupLimit, Sigmoid
from moebalance.kernels.launch import Program, launch
from moebalance.kernels.plain import Chosen
from moebalance.kernels.price import Settlement, Terms, terms
from moebalance.kernels.tiling import (
    Tiling,
    added,
    bytes_of,
    next_power,
    row_of,
    sums_of,
    tile,
)


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
    dtype: torch.dtype | None = None,
    tickets: Int[Tensor, "counters"] | None = None,
) -> Chosen:
    """Choose experts, weigh them and sum what was done, in one pass over the logits.

    Experts are ranked by affinity minus price, or by log-affinity minus a price in nats; without
    price and group limit, by their logit. Of equals the larger logit is ahead, then the lowest
    index. NaN ranks above all numbers, so a broken row still names K experts, and shows in the
    sums.

    Args:
        logits: (T, E), as `supported` wants them.
        gate: `Softmax()` or `Sigmoid()`.
        top_k: K.
        normalize: True divides a token's weights by their sum; False uses affinities.
        price: (E,), subtracted from the affinities before top-k, never from the weights.
        in_nats: True subtracts it from their logarithms instead.
        limit: the groups that a token may choose from; None for all experts.
        mask: (T,) True for real tokens; padded rows are routed but not summed.
        dtype: of the weights; None for the logits' own.
        tickets: from `new_tickets`, for one launch at a time. None makes them, in one more launch.

    Raises:
        ValueError: K out of 1..E, or a limit that does not fit.
    """
    rows, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must lie in 1..{num_experts}, the number of experts.")
    if limit is not None:
        limit.check(num_experts, top_k)
        limit = limit if limit.narrows else None
    weights = logits.new_empty(rows, top_k, dtype=dtype or logits.dtype)
    experts = logits.new_empty(rows, top_k, dtype=torch.int64)
    normaliser = logits.new_empty(rows, dtype=torch.float32)
    tiling = tile(logits, limit, sums=True)
    sums = sums_of(logits, tiling, tickets)
    sigmoid, padded = isinstance(gate, Sigmoid), mask is not None
    priced = _UNPRICED if price is None else _Priced(True, in_nats)
    launch(
        _choosing(tiling, top_k, normalize, sigmoid, limit, priced, padded),
        sums.programs,
        (
            logits,
            row_of(price, logits),
            bytes_of(mask, logits),
            weights,
            experts,
            normaliser,
            sums.partials,
            sums.packed,
            sums.tickets,
        ),
        rows,
        0,
    )
    return Chosen(weights, experts, normaliser, sums.packed)


def pull_back(
    upstream: Float[Tensor, "T K"],
    logits: Float[Tensor, "T E"],
    chosen_experts: Int[Tensor, "T K"],
    normaliser: Float[Tensor, "T"],
    gate: Gate,
    *,
    normalize: bool,
    charge: Float[Tensor, "E"] | Settlement | None = None,
    mask: Bool[Tensor, "T"] | None = None,
) -> Float[Tensor, "T E"]:
    """Gradient of the logits from the weights and from the charge, in one pass.

    Args:
        upstream: (T, K) gradient of the loss with respect to the weights.
        logits: (T, E), as given to `choose`.
        chosen_experts: (T, K), from `choose`.
        normaliser: (T,), from `choose`.
        gate: as given to `choose`.
        normalize: as given to `choose`.
        charge: q (E,), gradient of the loss with respect to Σ_t p_t over real tokens: price times
            strength · E / tokens · scale of the loss. Or what it is formed of. None for no charge.
        mask: (T,) as given to `choose`; padded rows are charged nothing.

    Returns:
        (T, E), contiguous, in the logits' dtype.
    """
    (rows, num_experts), top_k = logits.shape, chosen_experts.shape[1]
    gradient = logits.new_empty(rows, num_experts)
    tiling, cost = tile(logits, sums=False), terms(charge, logits)
    sigmoid, padded = isinstance(gate, Sigmoid), mask is not None
    launch(
        _pulling_back(tiling, top_k, normalize, sigmoid, padded, cost.kind),
        max(1, tiling.blocks(rows)),  # a batch without a token is counted too
        (
            upstream.contiguous(),
            logits,
            normaliser,
            chosen_experts,
            cost.charge,
            bytes_of(mask, logits),
            gradient,
            *cost.others,
        ),
        rows,
        *cost.numbers,
    )
    return gradient


class _Priced(NamedTuple):
    """What the choice subtracts, by the names in the program."""

    has_price: bool
    in_nats: bool


_UNPRICED = _Priced(False, False)


@cache
def _choosing(
    tiling: Tiling,
    top_k: int,
    normalize: bool,
    sigmoid: bool,
    limit: GroupLimit | None,
    priced: _Priced,
    padded: bool,
) -> Program:
    return Program(
        "programs.choose",
        **tiling.options,
        top_k=top_k,
        slots=next_power(top_k),
        sigmoid=sigmoid,
        normalize=normalize,
        **priced._asdict(),
        has_mask=padded,
        kept=0 if limit is None else limit.top_groups,
        best=1 if limit is None else limit.best,
        **added(tiling.sizes.num_experts, 2048),
    )


@cache
def _pulling_back(
    tiling: Tiling,
    top_k: int,
    normalize: bool,
    sigmoid: bool,
    padded: bool,
    kind: tuple[bool, ...],
) -> Program:
    return Program(
        "programs.pull_back",
        **tiling.options,
        **Terms.options(kind),
        top_k=top_k,
        slots=next_power(top_k),
        sigmoid=sigmoid,
        normalize=normalize,
        has_mask=padded,
    )
