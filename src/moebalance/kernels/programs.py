"""The fused router's two Triton programs. `plain.py` is their meaning, `router.py` starts them.

Shapes: T tokens (`rows`), E experts, K top-k (padded to `slots`). `tile_program.py` says how a
block of rows lies in registers, as (chunks, block, width).

Top-k is K rounds of arg-max on integer keys that sort as the floats do, NaN above all numbers. A
round needs two integer reductions: the largest key, then the lowest expert with it. Under a price
or in groups one lies between them, for the largest logit among equal keys. Each is one warp
instruction since Ampere; a reduction of floats or of pairs takes five or ten shuffles. 16-bit
logits leave room for the expert inside the key, so they need one reduction.

Only this module and the other four that end in `program.py` or `programs.py` import Triton.
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
    log_affinity_of,
    on_every_row,
    real_rows,
    score_of,
    scores_of,
    shares_of,
    sigmoid_of,
    write_tokens,
)

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
    packed,
    tickets,
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
    in_nats: tl.constexpr,
    has_mask: tl.constexpr,
    kept: tl.constexpr,
    best: tl.constexpr,
    lines: tl.constexpr,
    columns: tl.constexpr,
):
    """Choose and weigh the experts of every row; sum scores, counts and tokens.

    `kept`: number of groups (chunks) to keep, judged by the sum of their `best` ranks; 0 without
    groups. Programs stride over blocks of rows. Each writes one row of `partials`, and `join` adds
    them up into `packed` (2E + 2,).
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
            if in_nats:
                rank = log_affinity_of(z, sigmoid)
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
            weight = shares_of(z_chosen, sigmoid)
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
    join(partials, packed, tickets, 2 * num_experts + 2, lines, columns)


@triton.jit(do_not_specialize=["rows"])
def pull_back(
    upstream,
    logits,
    normaliser,
    experts,
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
    counts: tl.constexpr,
    forms: tl.constexpr,
    entropy: tl.constexpr,
    hard: tl.constexpr,
    peek: tl.constexpr,
    in_tokens: tl.constexpr,
    has_multiplier: tl.constexpr,
):
    """Write the gradient of the logits (T, E): from the weights and from the charge on the scores.

    Every row is written once as if nothing had been chosen, then again at its K chosen places.
    `counts`: whether the batch is counted here. `forms`: whether its charge is formed here.
    """
    q = settle(
        charge, packed, running, last_step, scale, mean, weight, multiplier, strength, rate,
        num_experts, chunks * width, has_charge,
        counts, forms, entropy, hard, peek, in_tokens, has_multiplier,
    )  # fmt: skip
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
            share = shares_of(z_chosen, sigmoid)
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
            cost = tl.where(real[None, :, None], tl.reshape(q, (chunks, 1, width)), 0.0)
            inner += tl.sum(tl.sum(score * cost, axis=0), axis=1)
            cost_chosen = tl.gather(q, tl.reshape(choice, (block * slots,)).to(tl.int32), axis=0)
            cost_chosen = tl.reshape(cost_chosen, (block, slots))
            cost_chosen = tl.where(wanted & real[:, None], cost_chosen, 0.0)
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
