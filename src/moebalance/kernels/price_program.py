"""The Triton program of `price.charge`: one block that holds vectors of E numbers.

It fuses φ-balancing's price (with the average's `peek`) and the sums of the step.
Shapes: E experts, padded to `width`, a power of two.
"""
# mypy: ignore-errors
# Triton compiles these functions as its own language, in which arguments carry no types.

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32, so that no logarithm is −∞."""


@triton.jit
def charge(
    packed,
    running,
    last_step,
    scale,
    mean,
    weight,
    multiplier,
    charged,
    strength,
    rate,
    num_experts: tl.constexpr,
    width: tl.constexpr,
    entropy: tl.constexpr,
    hard: tl.constexpr,
    peek: tl.constexpr,
    in_tokens: tl.constexpr,
    has_multiplier: tl.constexpr,
):
    """Add the batch's sums to the step's, and write the charge (E,) on the batch's scores."""
    expert = tl.arange(0, width)
    here = expert < num_experts
    scores = tl.load(packed + expert, mask=here, other=0.0)
    counts = tl.load(packed + num_experts + expert, mask=here, other=0.0)
    tokens = tl.load(packed + 2 * num_experts)
    batches = tl.load(packed + 2 * num_experts + 1)
    before = tl.load(running + expert, mask=here, other=0.0)
    tl.store(running + expert, before + scores, mask=here)
    before = tl.load(running + num_experts + expert, mask=here, other=0.0)
    tl.store(running + num_experts + expert, before + counts, mask=here)
    tail = running + 2 * num_experts
    tl.store(tail, tl.load(tail) + tokens)
    tl.store(tail + 1, tl.load(tail + 1) + batches)

    least = tl.maximum(tokens, 1.0)
    m = tl.load(mean + expert, mask=here, other=0.0)
    if peek:
        load = scores / least
        if hard:
            load = counts / tl.maximum(tl.sum(counts, axis=0), 1.0)
        if in_tokens:
            eta = _forgotten(tokens / rate)
        else:
            of_step = tl.load(last_step)
            of_step = tl.where(tl.load(last_step + 1) > 1.0, of_step, 0.0)
            eta = rate * (tokens / tl.maximum(least, of_step))
        old = tl.load(weight)
        m += eta / (old + eta * (1.0 - old)) * (load - m)
    price = m
    if entropy:
        price = tl.log(tl.maximum(m, TINY)) + 1.0
    worth = tl.sum(tl.where(here, m * price, 0.0), axis=0)
    factor = strength * tl.load(scale) * (num_experts / least)
    if has_multiplier:
        factor *= tl.load(multiplier)
    tl.store(charged + expert, (price - worth) * factor, mask=here)


@triton.jit
def _forgotten(x):
    """1 − exp(−x), x ≥ 0, exact to rounding: by its series where the difference loses digits."""
    series = x * (1.0 - x / 2.0 * (1.0 - x / 3.0 * (1.0 - x / 4.0)))
    return tl.where(x < 0.05, series, 1.0 - tl.exp(-x))
