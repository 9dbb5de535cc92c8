"""An exponential moving average that knows how much it has seen.

    w ← (1 − η) w + η,        m ← m + (η / w) (x − m),        w₀ = 0,

which is the bias-corrected mean of m ← (1 − η) m + η x with m₀ = 0, kept divided by its weight w
(Kingma & Ba, 2015, §3). For negative entropy the price ∇φ of it differs from that of the plain
average by the constant log w, which no gradient sees; for the other potentials the correction
removes a warm-up that a zero start would add.

The rate η may be given as it is, or as a memory of M tokens: a step of n tokens then has

    η = 1 − exp(−n / M),

under which two steps of n tokens forget exactly as much as one of 2n. A recipe so keeps its meaning
when the batch, the accumulation or the number of ranks changes.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.balancers.base import check_positive, check_rate
from moebalance.balancers.lineage import Lineage
from moebalance.routing import Batch, Gate


class Ema(NamedTuple):
    """Mean over the steps seen, `mean` (E,), and its accumulated `weight` (), float32."""

    mean: Float[Tensor, "E"]
    weight: Float[Tensor, ""]

    @classmethod
    def empty(cls, num_experts: int) -> "Ema":
        """Nothing seen: the mean is uniform until the first step replaces it."""
        uniform = torch.full((num_experts,), 1 / num_experts, dtype=torch.float32)
        # The least weight there is: nothing seen and nothing new is a gain of 0, not 0/0.
        return cls(uniform, torch.full((), _TINY, dtype=torch.float32))

    def toward(self, value: Float[Tensor, "E"], rate: float | Tensor) -> "Ema":
        """Move by `rate` toward `value`; a rate of 0 leaves all as it was."""
        weight = (self.weight + rate * (1 - self.weight)).to(self.weight.dtype)
        gain = (rate / weight).to(self.mean.dtype)
        return Ema(torch.lerp(self.mean, value.to(self.mean.dtype), gain), weight)

    def inherit(self, lineage: Lineage, gate: Gate) -> "Ema":
        """The mean is a mass; what has seen nothing stays empty."""
        if self.weight <= _TINY:
            return Ema(
                torch.full_like(lineage.mass(self.mean), 1 / lineage.num_experts), self.weight
            )
        return Ema(lineage.mass(self.mean), self.weight)


@runtime_checkable
class Remembers(Protocol):
    """A method with a memory: its rate, or the tokens that it remembers; the other is None."""

    @property
    def rate(self) -> float | None:
        """η in (0, 1]."""

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
        return
    if method.rate is None:
        object.__setattr__(method, "rate", default)
    check_rate("rate", default if method.rate is None else method.rate)


def step_rate(method: Remembers, tokens: Float[Tensor, ""]) -> Tensor:
    """η of a step of so many tokens; 0 if it has none."""
    if method.memory_tokens is None:
        assert method.rate is not None
        return method.rate * (tokens > 0).to(tokens.dtype)
    return -torch.expm1(-tokens / method.memory_tokens)


def batch_rate(method: Remembers, batch: Batch) -> float | Tensor:
    """η of one batch of a step, for a method that looks at it before the step is over."""
    if method.memory_tokens is None:
        assert method.rate is not None
        return method.rate * batch.share
    return step_rate(method, batch.sums.tokens)


_TINY = torch.finfo(torch.float32).tiny
