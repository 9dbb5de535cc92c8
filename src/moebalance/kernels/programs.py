"""The fused router's two Triton programs. `plain.py` is their meaning, `router.py` starts them.

Shapes: T tokens (`rows`), E experts, K top-k (padded to `slots`). A program holds `block` rows as a
tile (chunks, block, width) of registers; expert = chunk · step + lane.

The tile is loaded flat, as (chunks · block, width). Triton then spreads the width over the lanes of
a warp, the rows over warps, and the chunks over each thread's own registers. So a reduction over
chunks is free, and one over the width stays in a warp. With group-limited choice a chunk is a
group. Positions without an expert are dead: never chosen and never stored.

Top-k is K rounds of arg-max on integer keys that sort as the floats do, NaN above all numbers. A
round needs two integer reductions: the largest key, then the lowest expert with it. Under a price
or in groups one lies between them, for the largest logit among equal keys. Each is one warp
instruction since Ampere; a reduction of floats or of pairs takes five or ten shuffles. 16-bit
logits leave room for the expert inside the key, so they need one reduction.

Arithmetic is float32. exp(min(z, 0)) / (1 + exp(−|z|)) is σ(z) without overflow; divided by its
largest value it does not underflow either.

Only this module, `attached_programs.py` and `price_program.py` import Triton.
"""
# mypy: ignore-errors
# Triton compiles these functions as its own language, in which arguments carry no types.

import triton
import triton.language as tl

DEAD = tl.constexpr(-2147483647)
"""Key of a dead position; below the key of every float."""
TAKEN = tl.constexpr(-2147483648)
"""Key of a chosen position."""
LOW = tl.constexpr(4095)
"""Bits that are 0 in every bfloat16 or float16 widened to float32: room for the expert."""
NOBODY = tl.constexpr(2147483647)
"""Above every index; also the key of NaN."""


@triton.jit(do_not_specialize=["rows", "zero"])
def choose(
    logits,
    price,
    mask,
    weights,
    experts,
    normaliser,
    partials,
    rows,
    zero,
    stride: tl.constexpr,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    slots: tl.constexpr,
    sigmoid: tl.constexpr,
    normalize: tl.constexpr,
    has_price: tl.constexpr,
    has_mask: tl.constexpr,
    kept: tl.constexpr,
    best: tl.constexpr,
):
    """Choose and weigh the experts of every row; sum scores, counts and tokens per program.

    `kept`: number of groups (chunks) to keep, judged by the sum of their `best` ranks; 0 without
    groups. Programs stride over blocks of rows. Each writes one row of `partials`,
    (programs, 2E + 2).
    """
    if kept > 0:
        # The compiler does not know that this is zero, so it assumes no alignment. Each thread then
        # loads one logit of a group at a time, and a warp holds one row instead of four.
        logits += zero
        price += zero
    # A 16-bit float widened to float32 has free low bits: they hold the expert.
    packs: tl.constexpr = (
        logits.dtype.element_ty.primitive_bitwidth == 16 and not has_price and kept == 0
    )
    # Logits are ranked as they are. Affinities saturate: of equals the larger logit is ahead.
    ties: tl.constexpr = has_price or kept > 0
    expert, exists = experts_of(chunks, step, width, num_experts)
    slot = tl.arange(0, slots)[None, :]
    scores = tl.zeros((chunks, block, width), tl.float32)
    counts = tl.zeros((chunks, block, width), tl.int32)
    tokens = tl.zeros((block,), tl.int32)
    first = tl.program_id(0) * block
    for start in range(first, rows, tl.num_programs(0) * block):
        row = start + tl.arange(0, block)
        inside = row < rows
        real = real_rows(mask, row, inside, has_mask)
        begin = row.to(tl.int64) * stride
        z = load_tile(logits, start, rows, stride, chunks, step, width, block, num_experts)
        score, norm = scores_of(z, sigmoid)
        scores += tl.where(real[None, :, None], score, 0.0)
        tokens += real.to(tl.int32)
        tl.store(normaliser + row, norm, mask=inside)

        key = _key(z)
        of_equals = key
        if ties:
            rank = sigmoid_of(z) if sigmoid else score
            if has_price:
                rank -= on_every_row(price, chunks, step, width, block, num_experts)
            key = _key(rank)
        if packs:
            key = (key & ~LOW) | (LOW - expert)
        key = tl.where(exists, key, DEAD)
        if kept > 0:
            key = _limit(key, of_equals, exists, kept, best)
        choice = tl.zeros((block, slots), tl.int32)
        for k in range(top_k):
            largest = tl.max(tl.max(key, axis=0), axis=1)
            best_one = key == largest[None, :, None]
            if packs:
                found = LOW - (largest & LOW)
            else:
                if ties:
                    ahead = tl.where(best_one, of_equals, TAKEN)
                    ahead = tl.max(tl.max(ahead, axis=0), axis=1)
                    best_one = best_one & (of_equals == ahead[None, :, None])
                found = tl.where(best_one, expert, NOBODY)
                found = tl.min(tl.min(found, axis=0), axis=1)
                best_one = expert == found[None, :, None]
            key = tl.where(best_one, TAKEN, key)
            choice = tl.where(slot == k, found[:, None], choice)
        counts += ((key == TAKEN) & real[None, :, None]).to(tl.int32)

        wanted = (slot < top_k) & inside[:, None]
        z_chosen = tl.load(logits + (begin[:, None] + choice), mask=wanted, other=-float("inf"))
        z_chosen = z_chosen.to(tl.float32)
        if normalize:
            weight = _shares(z_chosen, sigmoid)
        elif sigmoid:
            weight = sigmoid_of(z_chosen)
        else:
            weight = tl.exp(z_chosen - norm[:, None])
        place = row.to(tl.int64)[:, None] * top_k + slot
        tl.store(weights + place, weight, mask=wanted)
        tl.store(experts + place, choice.to(tl.int64), mask=wanted)

    own = partials + tl.program_id(0).to(tl.int64) * (2 * num_experts + 2)
    score_sum = tl.sum(scores, axis=1, keep_dims=True)
    count_sum = tl.sum(counts, axis=1, keep_dims=True).to(tl.float32)
    tl.store(own + expert, score_sum, mask=exists)
    tl.store(own + num_experts + expert, count_sum, mask=exists)
    write_tokens(own, tokens, num_experts)


@triton.jit(do_not_specialize=["rows"])
def pull_back(
    upstream,
    logits,
    normaliser,
    experts,
    charge,
    mask,
    gradient,
    rows,
    stride: tl.constexpr,
    num_experts: tl.constexpr,
    top_k: tl.constexpr,
    chunks: tl.constexpr,
    step: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    slots: tl.constexpr,
    sigmoid: tl.constexpr,
    normalize: tl.constexpr,
    has_charge: tl.constexpr,
    has_mask: tl.constexpr,
):
    """Write the gradient of the logits (T, E): from the weights and from the charge on the scores.

    Every row is written once as if nothing had been chosen, then again at its K chosen places.
    """
    slot = tl.arange(0, slots)[None, :]
    start = tl.program_id(0) * block
    row = start + tl.arange(0, block)
    inside = row < rows
    real = real_rows(mask, row, inside, has_mask)
    begin = row.to(tl.int64) * stride
    # Weights that are scores depend on all logits of a row, other weights on the chosen ones.
    of_scores: tl.constexpr = not (sigmoid or normalize)
    needs_scores: tl.constexpr = has_charge or of_scores
    norm = tl.zeros((block,), tl.float32)
    inner = tl.zeros((block,), tl.float32)
    if needs_scores:
        norm = tl.load(normaliser + row, mask=inside, other=0.0)

    wanted = (slot < top_k) & inside[:, None]
    place = row.to(tl.int64)[:, None] * top_k + slot
    choice = tl.load(experts + place, mask=wanted, other=0)
    sent = tl.load(upstream + place, mask=wanted, other=0.0).to(tl.float32)
    z_chosen = tl.load(logits + (begin[:, None] + choice), mask=wanted, other=-float("inf"))
    z_chosen = z_chosen.to(tl.float32)
    at_chosen = tl.zeros((block, slots), tl.float32)
    if needs_scores:
        score_chosen = score_of(z_chosen, norm[:, None], sigmoid)
    if of_scores:
        inner += tl.sum(tl.where(wanted, score_chosen * sent, 0.0), axis=1)
        at_chosen = score_chosen * sent
    else:
        if normalize:
            share = _shares(z_chosen, sigmoid)
            mean = tl.sum(tl.where(wanted, share * sent, 0.0), axis=1)
            at_chosen = share * (sent - mean[:, None])
            if sigmoid:
                at_chosen *= sigmoid_of(-z_chosen)
        else:
            at_chosen = sent * sigmoid_of(z_chosen) * sigmoid_of(-z_chosen)

    slope = tl.zeros((chunks, block, width), tl.float32)
    if needs_scores:
        z = load_tile(logits, start, rows, stride, chunks, step, width, block, num_experts)
        score = score_of(z, norm[None, :, None], sigmoid)
        cost = tl.zeros((chunks, block, width), tl.float32)
        cost_chosen = tl.zeros((block, slots), tl.float32)
        if has_charge:
            cost = on_every_row(charge, chunks, step, width, block, num_experts)
            cost = tl.where(real[None, :, None], cost, 0.0)
            inner += tl.sum(tl.sum(score * cost, axis=0), axis=1)
            cost_chosen = tl.load(charge + choice, mask=wanted, other=0.0)
            cost_chosen = tl.where(real[:, None], cost_chosen, 0.0)
        slope = score * (cost - inner[None, :, None])
        slope_chosen = score_chosen * (cost_chosen - inner[:, None])
        if sigmoid:
            slope *= sigmoid_of(-z)
            slope_chosen *= sigmoid_of(-z_chosen)
        if not of_scores:
            # tl.where, not a product: a padded row may hold NaN, and 0 · NaN is NaN.
            slope = tl.where(real[None, :, None], slope, 0.0)
            slope_chosen = tl.where(real[:, None], slope_chosen, 0.0)
        at_chosen += slope_chosen
    out = row.to(tl.int64) * num_experts
    at, here = flat(start, rows, num_experts, chunks, step, width, block, num_experts)
    tl.store(gradient + at, tl.reshape(slope, (chunks * block, width)), mask=here)
    # Wait: other threads have just written these places.
    tl.debug_barrier()
    tl.store(gradient + (out[:, None] + choice), at_chosen, mask=wanted)


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
def _key(x):
    """An int32 that sorts as the float32 does, NaN last; −0 and 0 are one."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(x == 0.0, 0, key)
    return tl.where(x != x, NOBODY, key)


@triton.jit
def _float(key):
    """Undo `_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _limit(key, of_equals, exists, kept: tl.constexpr, best: tl.constexpr):
    """Keep the experts of the `kept` best chunks, of equals by `of_equals`; the others die."""
    lane = tl.arange(0, key.shape[2])[None, None, :]
    rest = key
    worth = tl.max(key, axis=2, keep_dims=True).to(tl.float32) * 0.0
    second = worth
    for _ in range(best):
        largest = tl.max(rest, axis=2, keep_dims=True)
        ahead = tl.max(tl.where(rest == largest, of_equals, TAKEN), axis=2, keep_dims=True)
        found = tl.where((rest == largest) & (of_equals == ahead), lane, NOBODY)
        rest = tl.where(lane == tl.min(found, axis=2, keep_dims=True), TAKEN, rest)
        worth += _float(largest)
        second += _float(ahead)
    chunk = tl.arange(0, key.shape[0])[:, None, None]
    group = tl.where(tl.max(exists.to(tl.int32), axis=2, keep_dims=True) > 0, _key(worth), DEAD)
    of_equals = _key(second)
    for _ in range(kept):
        top = tl.max(group, axis=0, keep_dims=True)
        ahead = tl.max(tl.where(group == top, of_equals, TAKEN), axis=0, keep_dims=True)
        first = tl.where((group == top) & (of_equals == ahead), chunk, NOBODY)
        group = tl.where(chunk == tl.min(first, axis=0, keep_dims=True), TAKEN, group)
    return tl.where(group == TAKEN, key, DEAD)


@triton.jit
def sigmoid_of(z):
    """σ(z), without overflow."""
    small = tl.exp(-tl.abs(z))
    return tl.where(z < 0, small, 1.0) / (1.0 + small)


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
def _shares(z, sigmoid: tl.constexpr):
    """softmax(a(z)) over axis 1."""
    relative = _relative(z, tl.max(z, axis=1)[:, None], sigmoid)
    return relative / tl.sum(relative, axis=1)[:, None]
