"""Count a batch and form its price, at the beginning of a program that writes a gradient.

Every program forms the whole charge for itself: E numbers from the batch's sums and the state, less
work than a launch. Only one counts, into a tensor that no program of the launch reads.

It knows φ-balancing's price (with the average's `peek`) and the sums of the step.
Shapes: E experts, padded to `columns`, a power of two.
"""
# mypy: ignore-errors
# Triton compiles these functions as its own language, in which arguments carry no types.

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal float32, so that no logarithm is −∞."""


@triton.jit
def settle(
    charge,
    packed,
    running,
    last_step,
    scale,
    mean,
    weight,
    multiplier,
    strength,
    rate,
    num_experts: tl.constexpr,
    columns: tl.constexpr,
    has_charge: tl.constexpr,
    counts: tl.constexpr,
    forms: tl.constexpr,
    entropy: tl.constexpr,
    hard: tl.constexpr,
    peek: tl.constexpr,
    in_tokens: tl.constexpr,
    has_multiplier: tl.constexpr,
):
    """The charge (columns,) on the scores of any token of the batch; 0 where no expert is.

    `counts`: add the batch to the step. `forms`: form the charge; else it is loaded, if given.
    """
    if counts:
        _count(packed, running, num_experts, columns)
    if forms:
        charged = _formed(
            packed, last_step, scale, mean, weight, multiplier, strength, rate,
            num_experts, columns, entropy, hard, peek, in_tokens, has_multiplier,
        )  # fmt: skip
    elif has_charge:
        expert = tl.arange(0, columns)
        charged = tl.load(charge + expert, mask=expert < num_experts, other=0.0)
    else:
        charged = tl.zeros((columns,), tl.float32)
    return charged


@triton.jit
def _count(packed, running, num_experts: tl.constexpr, columns: tl.constexpr):
    """Add the batch's sums to the step's, in the first program alone."""
    if tl.program_id(0) == 0:
        for part in tl.static_range(2):
            expert = part * num_experts + tl.arange(0, columns)
            here = tl.arange(0, columns) < num_experts
            before = tl.load(running + expert, mask=here, other=0.0)
            now = before + tl.load(packed + expert, mask=here, other=0.0)
            tl.store(running + expert, now, mask=here)
        for tail in tl.static_range(2):
            at = 2 * num_experts + tail
            tl.store(running + at, tl.load(running + at) + tl.load(packed + at))


@triton.jit
def _formed(
    packed,
    last_step,
    scale,
    mean,
    weight,
    multiplier,
    strength,
    rate,
    num_experts: tl.constexpr,
    columns: tl.constexpr,
    entropy: tl.constexpr,
    hard: tl.constexpr,
    peek: tl.constexpr,
    in_tokens: tl.constexpr,
    has_multiplier: tl.constexpr,
):
    expert = tl.arange(0, columns)
    here = expert < num_experts
    tokens = tl.load(packed + 2 * num_experts)
    least = tl.maximum(tokens, 1.0)
    m = tl.load(mean + expert, mask=here, other=0.0)
    if peek:
        if hard:
            counts = tl.load(packed + num_experts + expert, mask=here, other=0.0)
            load = counts / tl.maximum(tl.sum(counts, axis=0), 1.0)
        else:
            load = tl.load(packed + expert, mask=here, other=0.0) / least
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
    return tl.where(here, (price - worth) * factor, 0.0)


@triton.jit
def _forgotten(x):
    """1 − exp(−x), x ≥ 0, exact to rounding: by its series where the difference loses digits."""
    series = x * (1.0 - x / 2.0 * (1.0 - x / 3.0 * (1.0 - x / 4.0)))
    return tl.where(x < 0.05, series, 1.0 - tl.exp(-x))
