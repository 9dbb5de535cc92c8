"""The two Triton programs of `attached.py`, on tiles of registers as those of `programs.py` are."""
# mypy: ignore-errors
# Triton reads these functions as a language of its own, in which arguments carry no types.

import triton
import triton.language as tl

from moebalance.kernels.programs import (
    experts_of,
    flat,
    on_every_row,
    score_of,
    scores_of,
    sigmoid_of,
    write_sums,
)


@triton.jit(do_not_specialize=["rows"])
def count(
    logits,
    experts,
    mask,
    normaliser,
    partials,
    rows,
    stride: tl.constexpr,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    sigmoid: tl.constexpr,
    has_mask: tl.constexpr,
):
    """Sum scores, counts and tokens per program; programs stride over the blocks of rows."""
    expert, exists = experts_of(chunks, step, width, num_experts)
    scores = tl.zeros((chunks, block, width), tl.float32)
    counts = tl.zeros((chunks, block, width), tl.int32)
    tokens = tl.zeros((block,), tl.int32)
    for start in range(tl.program_id(0) * block, rows, tl.num_programs(0) * block):
        row = start + tl.arange(0, block)
        inside = row < rows
        real = inside
        if has_mask:
            real = tl.load(mask + row, mask=inside, other=0) != 0
        at, here = flat(start, rows, stride, chunks, step, width, block, num_experts)
        z = tl.load(logits + at, mask=here, other=-float("inf")).to(tl.float32)
        z = tl.reshape(z, (chunks, block, width))
        score, norm = scores_of(z, sigmoid)
        scores += tl.where(real[None, :, None], score, 0.0)
        tokens += real.to(tl.int32)
        tl.store(normaliser + row, norm, mask=inside)
        for k in tl.static_range(top_k):
            choice = tl.load(experts + row.to(tl.int64) * top_k + k, mask=real, other=-1)
            counts += (expert == choice.to(tl.int32)[None, :, None]).to(tl.int32)
    write_sums(partials, scores, counts, tokens, expert, exists, num_experts)


@triton.jit(do_not_specialize=["rows"])
def pull(
    logits,
    normaliser,
    charge,
    mask,
    gradient,
    rows,
    stride: tl.constexpr,
    num_experts: tl.constexpr,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    sigmoid: tl.constexpr,
    has_mask: tl.constexpr,
):
    """Write p ∘ (q − ⟨p, q⟩) ∘ a'(z), 0 in padded rows."""
    start = tl.program_id(0) * block
    row = start + tl.arange(0, block)
    inside = row < rows
    at, here = flat(start, rows, stride, chunks, step, width, block, num_experts)
    z = tl.load(logits + at, mask=here, other=-float("inf")).to(tl.float32)
    z = tl.reshape(z, (chunks, block, width))
    norm = tl.load(normaliser + row, mask=inside, other=0.0)
    score = score_of(z, norm[None, :, None], sigmoid)
    cost = on_every_row(charge, chunks, step, width, block, num_experts)
    inner = tl.sum(tl.sum(score * cost, axis=0), axis=1)
    slope = score * (cost - inner[None, :, None])
    if sigmoid:
        slope *= sigmoid_of(-z)
    if has_mask:
        # Whatever a padded row holds: 0 · NaN would be NaN.
        real = tl.load(mask + row, mask=inside, other=0) != 0
        slope = tl.where(real[None, :, None], slope, 0.0)
    at, here = flat(start, rows, num_experts, chunks, step, width, block, num_experts)
    tl.store(gradient + at, tl.reshape(slope, (chunks * block, width)), mask=here)
