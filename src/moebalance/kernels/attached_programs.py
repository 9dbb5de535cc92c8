"""The two Triton programs of `attached.py`, on register tiles (`tile_program.py`).

Shapes: T tokens (`rows`), E experts, K top-k; a tile is (chunks, block, width).
"""
# mypy: ignore-errors
# Triton compiles these functions as its own language, in which arguments carry no types.

import triton
import triton.language as tl

from moebalance.kernels.price_program import settle
from moebalance.kernels.sums_program import join
from moebalance.kernels.tile_program import (
    experts_of,
    flat,
    load_tile,
    real_rows,
    scores_of,
    sigmoid_of,
    write_tokens,
)


@triton.jit(do_not_specialize=["rows"])
def count(
    logits,
    experts,
    mask,
    partials,
    packed,
    tickets,
    rows,
    stride: tl.constexpr,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    bins: tl.constexpr,
    slab: tl.constexpr,
    sigmoid: tl.constexpr,
    has_mask: tl.constexpr,
    lines: tl.constexpr,
    columns: tl.constexpr,
):
    """Sum scores, counts and tokens; programs stride over blocks of rows."""
    scores = tl.zeros((chunks, block, width), tl.float32)
    tokens = tl.zeros((block,), tl.int32)
    for start in range(tl.program_id(0) * block, rows, tl.num_programs(0) * block):
        row = start + tl.arange(0, block)
        inside = row < rows
        real = real_rows(mask, row, inside, has_mask)
        z = load_tile(logits, start, rows, stride, chunks, step, width, block, num_experts)
        score, _ = scores_of(z, sigmoid)
        scores += tl.where(real[None, :, None], score, 0.0)
        tokens += real.to(tl.int32)

    # Choices (T * K,) are counted as a flat list: any program may count any of them.
    counts = tl.zeros((bins,), tl.int32)
    for start in range(tl.program_id(0) * slab, rows * top_k, tl.num_programs(0) * slab):
        place = start + tl.arange(0, slab)
        real = place < rows * top_k
        choice = tl.load(experts + place, mask=real, other=num_experts).to(tl.int32)
        # A histogram does not check its input: send invalid choices to an extra bin.
        counted = (choice >= 0) & (choice < num_experts)
        if has_mask:
            counted &= tl.load(mask + place // top_k, mask=real, other=0) != 0
        choice = tl.where(counted, choice, num_experts)
        counts += tl.histogram(choice, bins)

    own = partials + tl.program_id(0).to(tl.int64) * (2 * num_experts + 2)
    expert, exists = experts_of(chunks, step, width, num_experts)
    tl.store(own + expert, tl.sum(scores, axis=1, keep_dims=True), mask=exists)
    bin = tl.arange(0, bins)
    tl.store(own + num_experts + bin, counts.to(tl.float32), mask=bin < num_experts)
    write_tokens(own, tokens, num_experts)
    join(partials, packed, tickets, 2 * num_experts + 2, lines, columns)


@triton.jit(do_not_specialize=["rows"])
def pull(
    logits,
    charge,
    mask,
    gradient,
    packed,
    running,
    last_step,
    scale,
    mean,
    weight,
    multiplier,
    rows,
    strength,
    rate,
    stride: tl.constexpr,
    num_experts: tl.constexpr,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    sigmoid: tl.constexpr,
    has_mask: tl.constexpr,
    counts: tl.constexpr,
    forms: tl.constexpr,
    entropy: tl.constexpr,
    hard: tl.constexpr,
    peek: tl.constexpr,
    in_tokens: tl.constexpr,
    has_multiplier: tl.constexpr,
):
    """Write p ∘ (q − ⟨p, q⟩) ∘ a'(z), (T, E); 0 in padded rows. Flags: `programs.pull_back`."""
    q = settle(
        charge, packed, running, last_step, scale, mean, weight, multiplier, strength, rate,
        num_experts, chunks * width, True,
        counts, forms, entropy, hard, peek, in_tokens, has_multiplier,
    )  # fmt: skip
    start = tl.program_id(0) * block
    row = start + tl.arange(0, block)
    z = load_tile(logits, start, rows, stride, chunks, step, width, block, num_experts)
    score, _ = scores_of(z, sigmoid)
    cost = tl.reshape(q, (chunks, 1, width))
    inner = tl.sum(tl.sum(score * cost, axis=0), axis=1)
    slope = score * (cost - inner[None, :, None])
    if sigmoid:
        slope *= sigmoid_of(-z)
    if has_mask:
        # tl.where, not a product: a padded row may hold NaN, and 0 · NaN is NaN.
        real = real_rows(mask, row, row < rows, has_mask)
        slope = tl.where(real[None, :, None], slope, 0.0)
    at, here = flat(start, rows, num_experts, chunks, step, width, block, num_experts)
    tl.store(gradient + at, tl.reshape(slope, (chunks * block, width)), mask=here)
