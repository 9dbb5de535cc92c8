"""Two fused passes for a router of another library, both in the backward pass.

    count   z (T, E), chosen experts (T, K) → packed sums (2E + 2,)
    pull    z (T, E), charge q (E,) → ∂/∂z of ⟨q, Σ_t p_t⟩, (T, E)

The batch's price is formed between them. Each pass reads the logits once, and the second writes
their gradient: three times the logits' bytes in all. Sums are deterministic, as in `router.choose`.
Plain form: `core.autograd._from_affinities`.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.gates import Gate, Sigmoid
from moebalance.kernels.launch import launch
from moebalance.kernels.tiling import bytes_of, next_power, row_of, tile

_SLAB = 1024  # choices that a program counts at a time


def count(
    logits: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    gate: Gate,
    *,
    mask: Bool[Tensor, "T"] | None = None,
) -> Float[Tensor, "sums"]:
    """Sum scores and choices, in one pass over the logits.

    Args:
        logits: (T, E), as `supported` wants them.
        experts: (T, K), the K different experts of each token. An index outside 0 … E − 1 is not
            counted.
        gate: `Softmax()` or `Sigmoid()`.
        mask: (T,) True for real tokens; padded rows are not summed. None if all are real.

    Returns:
        (2E + 2,): scores Σ_t p_t (E,), counts (E,), tokens, and a 1 that counts the batch.
    """
    rows, num_experts = logits.shape
    tiling = tile(logits, sums=True)
    programs = max(1, min(tiling.blocks(rows), tiling.programs))
    partials = logits.new_empty(programs, 2 * num_experts + 2, dtype=torch.float32)
    launch(
        "attached_programs.count",
        programs,
        (logits, experts.contiguous(), bytes_of(mask, logits), partials),
        rows,
        **tiling.options,
        top_k=experts.shape[1],
        bins=next_power(num_experts + 1),  # + 1: a bin for choices that do not count
        slab=_SLAB,
        sigmoid=isinstance(gate, Sigmoid),
        has_mask=mask is not None,
    )
    return partials.sum(dim=0)


def pull(
    logits: Float[Tensor, "T E"],
    gate: Gate,
    charge: Float[Tensor, "E"],
    *,
    mask: Bool[Tensor, "T"] | None = None,
) -> Float[Tensor, "T E"]:
    """Gradient of the logits from a charge on their scores, in one pass.

    Args:
        logits: (T, E), as given to `count`.
        gate: as given to `count`.
        charge: q (E,), gradient of the loss with respect to Σ_t p_t over real tokens.
        mask: (T,) as given to `count`; padded rows get gradient 0.

    Returns:
        (T, E), contiguous, in the logits' dtype.
    """
    rows, num_experts = logits.shape
    gradient = logits.new_empty(rows, num_experts)
    tiling = tile(logits, sums=False)
    if rows:
        launch(
            "attached_programs.pull",
            tiling.blocks(rows),
            (logits, row_of(charge, logits), bytes_of(mask, logits), gradient),
            rows,
            **tiling.options,
            sigmoid=isinstance(gate, Sigmoid),
            has_mask=mask is not None,
        )
    return gradient
