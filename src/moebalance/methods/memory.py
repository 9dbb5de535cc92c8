"""How long a method remembers: a rate, a number of tokens, or measured.

The rate η of a moving average (`ema.py`) is the weight of the newest step. A memory of M tokens
gives a step of n tokens the rate

    η = 1 − exp(−n / M).

Two steps of n tokens then forget exactly as much as one step of 2n. So a recipe means the same for
any batch size, accumulation and number of ranks. `rate="auto"` measures the rate during training
(`adaptive.py`).
"""

from __future__ import annotations

import math
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.methods.adaptive import Adaptive
from moebalance.methods.base import check_positive, check_rate
from moebalance.methods.ema import Ema
from moebalance.routing import Batch, as_number

AUTO = "auto"

MEMORY_TOKENS = 10_000.0
"""A rate of about 0.1 at 1024 tokens a step; a step of a million tokens needs no memory."""

Rate = float | Literal["auto"]
Memory = Ema | Adaptive


@runtime_checkable
class Remembers(Protocol):
    """A method with a memory: a rate, or a number of tokens; the other is None."""

    @property
    def rate(self) -> Rate | None:
        """η in (0, 1], or "auto"."""

    @property
    def memory_tokens(self) -> float | None:
        """M > 0."""


def settle_memory(method: Remembers) -> None:
    """Check a frozen method's rate and memory, and fill in the default memory if it has neither.

    Raises:
        ValueError: both are given, or one is out of range.
    """
    if method.rate is not None and method.memory_tokens is not None:
        raise ValueError(
            f"rate={method.rate!r} and memory_tokens={method.memory_tokens!r}: give one of them. A "
            "memory of M tokens is a rate of 1 − exp(−n / M) in a step of n tokens."
        )
    if method.rate is None:
        if method.memory_tokens is None:
            object.__setattr__(method, "memory_tokens", MEMORY_TOKENS)
        check_positive("memory_tokens", method.memory_tokens, zero=False)  # type: ignore[arg-type]
    elif isinstance(method.rate, str):
        if method.rate != AUTO:
            raise ValueError(f"rate={method.rate!r}: must be a number in (0, 1], or {AUTO!r}.")
    else:
        check_rate("rate", method.rate)


def begin(method: Remembers, num_experts: int) -> Memory:
    """An empty memory."""
    return Adaptive.empty(num_experts) if method.rate == AUTO else Ema.empty(num_experts)


def remember(
    method: Remembers, memory: Memory, load: Float[Tensor, "E"], tokens: Float[Tensor, ""]
) -> Memory:
    """The memory after a step with this load (E,); unchanged if the step has no token."""
    if isinstance(memory, Adaptive):
        return memory.after(load, (tokens > 0).to(memory.mean.dtype))
    return memory.toward(load, _step_rate(method, tokens))


def peek(
    method: Remembers, memory: Memory, load: Float[Tensor, "E"], batch: Batch
) -> Float[Tensor, "E"]:
    """The mean (E,) as if one batch's load (E,) were already a part of it."""
    average = memory.average if isinstance(memory, Adaptive) else memory
    return average.peek(load, batch_rate(method, memory, batch))


def readings(memory: Memory) -> dict[str, Float[Tensor, ""]]:
    """The rate of the next step, if it is measured."""
    return {"rate": memory.rate} if isinstance(memory, Adaptive) else {}


def batch_rate(method: Remembers, memory: Memory, batch: Batch) -> float | Tensor:
    """η of one batch, for a method that prices it before the step is over."""
    if isinstance(memory, Adaptive):
        return memory.rate * batch.fraction
    if method.memory_tokens is not None:
        tokens = as_number(batch.sums.tokens) if batch.known is None else batch.known
        if isinstance(tokens, float | int):
            return -math.expm1(-tokens / method.memory_tokens)
        return _step_rate(method, tokens)
    assert isinstance(method.rate, float | int)
    return method.rate * batch.fraction


def _step_rate(method: Remembers, tokens: Float[Tensor, ""]) -> Tensor:
    """η of a step with this many tokens; 0 without tokens."""
    if method.memory_tokens is not None:
        return -torch.expm1(-tokens / method.memory_tokens)
    assert isinstance(method.rate, float | int)
    return method.rate * (tokens > 0).to(tokens.dtype)
