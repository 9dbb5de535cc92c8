"""How long a method remembers: a rate, a number of tokens, or as long as the noise asks for.

The rate η of a method's moving average (`ema.py`) may be given as it is, or as a memory of M
tokens: a step of n tokens then has

    η = 1 − exp(−n / M),

under which two steps of n tokens forget exactly as much as one of 2n. A recipe so keeps its meaning
when the batch, the accumulation or the number of ranks changes. With `rate="auto"` it is measured
while training goes on (`adaptive.py`).
"""

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.methods.adaptive import Adaptive
from moebalance.methods.base import check_positive, check_rate
from moebalance.methods.ema import Ema
from moebalance.routing import Batch

AUTO = "auto"

Rate = float | Literal["auto"]
Memory = Ema | Adaptive


@runtime_checkable
class Remembers(Protocol):
    """A method with a memory: its rate, or the tokens that it remembers; the other is None."""

    @property
    def rate(self) -> Rate | None:
        """η in (0, 1], or "auto"."""

    @property
    def memory_tokens(self) -> float | None:
        """M > 0."""


def settle_rate(method: Remembers, default: float) -> None:
    """Check a frozen method's rate and memory, and fill in the default rate if it has neither.

    Raises:
        ValueError: both are given, or one is out of range.
    """
    if method.rate is not None and method.memory_tokens is not None:
        raise ValueError(
            f"rate={method.rate!r} and memory_tokens={method.memory_tokens!r}: give one of them; a "
            "memory of M tokens is a rate of 1 − exp(−n / M) in a step of n tokens."
        )
    if method.memory_tokens is not None:
        check_positive("memory_tokens", method.memory_tokens, zero=False)
    elif method.rate is None:
        object.__setattr__(method, "rate", default)
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
    """The memory after a step of this load; as it was if the step had no token."""
    if isinstance(memory, Adaptive):
        return memory.after(load, (tokens > 0).to(memory.mean.dtype))
    return memory.toward(load, _step_rate(method, tokens))


def peek(
    method: Remembers, memory: Memory, load: Float[Tensor, "E"], batch: Batch
) -> Float[Tensor, "E"]:
    """The mean as if one batch of a step, of this load, were a part of it already."""
    average = memory.average if isinstance(memory, Adaptive) else memory
    return average.peek(load, batch_rate(method, memory, batch))


def readings(memory: Memory) -> dict[str, Float[Tensor, ""]]:
    """The rate of the next step, where it is measured."""
    return {"rate": memory.rate} if isinstance(memory, Adaptive) else {}


def batch_rate(method: Remembers, memory: Memory, batch: Batch) -> float | Tensor:
    """η of one batch of a step, for a method that looks at it before the step is over."""
    if isinstance(memory, Adaptive):
        return memory.rate * batch.fraction
    if method.memory_tokens is not None:
        return _step_rate(method, batch.sums.tokens)
    assert isinstance(method.rate, float | int)
    return method.rate * batch.fraction


def _step_rate(method: Remembers, tokens: Float[Tensor, ""]) -> Tensor:
    """η of a step of so many tokens; 0 if it has none."""
    if method.memory_tokens is not None:
        return -torch.expm1(-tokens / method.memory_tokens)
    assert isinstance(method.rate, float | int)
    return method.rate * (tokens > 0).to(tokens.dtype)
