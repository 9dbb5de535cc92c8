"""Two fused passes for a router of another library, both in the backward pass.

    count   z (T, E), chosen experts (T, K) → packed sums (2E + 2,)
    pull    z (T, E), charge q (E,) → ∂/∂z of ⟨q, Σ_t p_t⟩, (T, E)

Each pass is one launch. The second counts the batch and forms its price, as in `router.pull_back`.
Each reads the logits once, and the second writes their gradient: three times the logits' bytes in
all. Sums are deterministic, as in `router.choose`.
Plain form: `core.autograd._from_affinities`.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

from functools import cache

from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.gates import Gate, Sigmoid
from moebalance.kernels.launch import Program, launch
from moebalance.kernels.price import Settlement, Terms, terms
from moebalance.kernels.tiling import Tiling, added, bytes_of, next_power, sums_of, tile

_SLAB = 1024  # choices that a program counts at a time


def count(
    logits: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    gate: Gate,
    *,
    mask: Bool[Tensor, "T"] | None = None,
    tickets: Int[Tensor, "counters"] | None = None,
) -> Float[Tensor, "sums"]:
    """Sum scores and choices, in one pass over the logits.

    Args:
        logits: (T, E), as `supported` wants them.
        experts: (T, K), the K different experts of each token. An index outside 0 … E − 1 is not
            counted.
        gate: `Softmax()` or `Sigmoid()`.
        mask: (T,) True for real tokens; padded rows are not summed. None if all are real.
        tickets: as in `router.choose`.

    Returns:
        (2E + 2,): scores Σ_t p_t (E,), counts (E,), tokens, and a 1 that counts the batch.
    """
    tiling = tile(logits, sums=True)
    sums = sums_of(logits, tiling, tickets)
    launch(
        _counting(tiling, experts.shape[1], isinstance(gate, Sigmoid), mask is not None),
        sums.programs,
        (
            logits,
            experts.contiguous(),
            bytes_of(mask, logits),
            sums.partials,
            sums.packed,
            sums.tickets,
        ),
        len(logits),
    )
    return sums.packed


def pull(
    logits: Float[Tensor, "T E"],
    gate: Gate,
    charge: Float[Tensor, "E"] | Settlement,
    *,
    mask: Bool[Tensor, "T"] | None = None,
) -> Float[Tensor, "T E"]:
    """Gradient of the logits from a charge on their scores, in one pass.

    Args:
        logits: (T, E), as given to `count`.
        gate: as given to `count`.
        charge: q (E,), gradient of the loss with respect to Σ_t p_t over real tokens, or what it
            is formed of.
        mask: (T,) as given to `count`; padded rows get gradient 0.

    Returns:
        (T, E), contiguous, in the logits' dtype.
    """
    rows, num_experts = logits.shape
    gradient = logits.new_empty(rows, num_experts)
    tiling, cost = tile(logits, sums=False), terms(charge, logits)
    launch(
        _pulling(tiling, isinstance(gate, Sigmoid), mask is not None, cost.kind),
        max(1, tiling.blocks(rows)),
        (logits, cost.charge, bytes_of(mask, logits), gradient, *cost.others),
        rows,
        *cost.numbers,
    )
    return gradient


@cache
def _counting(tiling: Tiling, top_k: int, sigmoid: bool, padded: bool) -> Program:
    experts = tiling.sizes.num_experts
    return Program(
        "attached_programs.count",
        **tiling.options,
        top_k=top_k,
        bins=next_power(experts + 1),  # + 1: a bin for choices that do not count
        slab=_SLAB,
        sigmoid=sigmoid,
        has_mask=padded,
        **added(experts, 1024),  # few: it has half the registers of `choose`
    )


@cache
def _pulling(tiling: Tiling, sigmoid: bool, padded: bool, kind: tuple[bool, ...]) -> Program:
    about = Terms.options(kind)
    assert about.pop("has_charge")  # or there is nothing to pull
    return Program(
        "attached_programs.pull", **tiling.options, **about, sigmoid=sigmoid, has_mask=padded
    )
