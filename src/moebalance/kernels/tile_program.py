"""What the programs have in common: a block of rows as a tile of registers, and scores of it.

Shapes: T tokens (`rows`), E experts. A program holds `block` rows as a tile (chunks, block, width)
of registers; expert = chunk · step + lane.

The tile is loaded flat, as (chunks · block, width). Triton then spreads the width over the lanes of
a warp, the rows over warps, and the chunks over each thread's own registers. So a reduction over
chunks is free, and one over the width stays in a warp. With group-limited choice a chunk is a
group. Positions without an expert are dead: never chosen and never stored.

Arithmetic is float32. exp(min(z, 0)) / (1 + exp(−|z|)) is σ(z) without overflow; divided by its
largest value it does not underflow either.
"""
# mypy: ignore-errors
# Triton compiles these functions as its own language, in which arguments carry no types.

import triton
import triton.language as tl


@triton.jit
def real_rows(mask, row, inside, has_mask: tl.constexpr):
    """Which of these rows (block,) are real tokens."""
    real = inside
    if has_mask:
        real = tl.load(mask + row, mask=inside, other=0) != 0
    return real


@triton.jit
def load_tile(
    logits,
    start,
    rows,
    stride: tl.constexpr,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    num_experts: tl.constexpr,
):
    """The logits (chunks, block, width) from row `start` on; −∞ at dead positions."""
    at, here = flat(start, rows, stride, chunks, step, width, block, num_experts)
    z = tl.load(logits + at, mask=here, other=-float("inf")).to(tl.float32)
    return tl.reshape(z, (chunks, block, width))


@triton.jit
def write_tokens(own, tokens, num_experts: tl.constexpr):
    """Write the last two of a program's sums: its tokens, and 1 for the batch (once)."""
    tl.store(own + 2 * num_experts, tl.sum(tokens, axis=0).to(tl.float32))
    tl.store(own + 2 * num_experts + 1, (tl.program_id(0) == 0).to(tl.float32))


@triton.jit
def experts_of(
    chunks: tl.constexpr, step: tl.constexpr, width: tl.constexpr, num_experts: tl.constexpr
):
    """The expert (chunks, 1, width) of each position, and whether it exists."""
    lane = tl.arange(0, width)[None, None, :]
    expert = tl.arange(0, chunks)[:, None, None] * step + lane
    return expert, (lane < step) & (expert < num_experts)


@triton.jit
def flat(
    start,
    rows,
    stride: tl.constexpr,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    num_experts: tl.constexpr,
):
    """Offsets (chunks * block, width) of the tile from row `start` on, and which exist."""
    line = tl.arange(0, chunks * block)[:, None]
    lane = tl.arange(0, width)[None, :]
    row = start + line % block
    expert = (line // block) * step + lane
    at = row.to(tl.int64) * stride + expert
    return at, (row < rows) & (lane < step) & (expert < num_experts)


@triton.jit
def on_every_row(
    values,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    num_experts: tl.constexpr,
):
    """A row of values (E,), as a tile (chunks, block, width)."""
    at, here = flat(0, block, 0, chunks, step, width, block, num_experts)
    return tl.reshape(tl.load(values + at, mask=here, other=0.0), (chunks, block, width))


@triton.jit
def sigmoid_of(z):
    """σ(z), without overflow."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z < 0, small, 1.0) / (1.0 + small)


@triton.jit
def log_affinity_of(z, sigmoid: tl.constexpr):
    """log σ(z); for softmax z itself, which differs by a constant per token."""
    if sigmoid:
        # log(1 + small) by the rounded sum: where that is 1, small itself is the logarithm.
        small = tl.exp(-tl.abs(z))
        sum = 1.0 + small
        rounded = tl.where(sum == 1.0, 1.0, sum - 1.0)
        return tl.minimum(z, 0.0) - tl.where(sum == 1.0, small, tl.log(sum) * (small / rounded))
    return z


@triton.jit
def _relative(z, peak, sigmoid: tl.constexpr):
    """exp a(z), over exp(peak) or, with sigmoid, over exp(min(peak, 0)); at most 1."""
    if sigmoid:
        low = tl.exp(tl.minimum(z, 0.0) - tl.minimum(peak, 0.0))
        return low / (1.0 + tl.exp(-tl.abs(z)))
    return tl.exp(z - peak)


@triton.jit
def scores_of(z, sigmoid: tl.constexpr):
    """The scores of a tile of logits (chunks, block, width), and the normaliser (block,)."""
    peak = tl.max(tl.max(z, axis=0), axis=1)
    relative = _relative(z, peak[None, :, None], sigmoid)
    total = tl.sum(tl.sum(relative, axis=0), axis=1)
    norm = tl.log(total) + (tl.minimum(peak, 0.0) if sigmoid else peak)
    return relative * (1.0 / total)[None, :, None], norm


@triton.jit
def score_of(z, norm, sigmoid: tl.constexpr):
    """The score p = exp(a(z) − norm)."""
    if sigmoid:
        return tl.exp(tl.minimum(z, 0.0) - norm) / (1.0 + tl.exp(-tl.abs(z)))
    return tl.exp(z - norm)


@triton.jit
def shares_of(z, sigmoid: tl.constexpr):
    """softmax(a(z)) over axis 1."""
    relative = _relative(z, tl.max(z, axis=1)[:, None], sigmoid)
    return relative / tl.sum(relative, axis=1)[:, None]
