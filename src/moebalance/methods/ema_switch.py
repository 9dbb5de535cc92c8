"""EMA-Switch: the Switch loss with the hard load averaged over steps.

    m ← (1 − η) m + η f,        loss = task + α · E · ⟨m, P⟩.

It has φ-balancing's memory, but the hard load and the Euclidean potential. Include it in every
comparison with φ-balancing: it shows whether the potential or the memory does the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, Traits, check_positive
from moebalance.methods.memory import Memory, Rate, begin, peek, readings, remember, settle_memory
from moebalance.proportions import (
    Proportions,
    check_proportions,
    per_proportion,
    settle_proportions,
)
from moebalance.routing import Batch, Sums


@dataclass(frozen=True, repr=False)
class EmaSwitchLoss(Method):
    """Switch loss on a moving average of the hard load.

    Args:
        strength: α ≥ 0.
        rate: η in (0, 1] instead of `memory_tokens`: weight of the newest step. At 1, with one
            batch a step, this is the Switch loss. "auto" measures it (`adaptive.py`).
        memory_tokens: M > 0: a step of n tokens has η = 1 − exp(−n / M). 10,000 if there is no
            rate.
        proportions: (E,) positive, target parts of the load; None for equal parts.

    Raises:
        ValueError: strength, rate, memory or proportions out of range, or both rate and memory.
    """

    strength: float = 1e-2
    rate: Rate | None = None
    memory_tokens: float | None = None
    proportions: Proportions | None = None

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)
        settle_memory(self)
        settle_proportions(self)

    @property
    def traits(self) -> Traits:
        """Each batch's load is part of its own price."""
        return super().traits._replace(
            from_sums=True, coupling="batch", shared=frozenset({"counts"})
        )

    def readings(self, state: Memory) -> dict[str, Float[Tensor, ""]]:
        """The rate, where it adapts."""
        return readings(state)

    def init(self, num_experts: int) -> Memory:
        """An empty average."""
        check_proportions(self.proportions, num_experts)
        return begin(self, num_experts)

    def update(self, state: Memory, sums: Sums) -> Memory:
        """m ← (1 − η) m + η f, once per optimizer step."""
        return remember(self, state, sums.hard_load, sums.tokens)

    def loss_price(self, state: Memory, batch: Batch) -> Float[Tensor, "E"]:
        """α m (E,) relative to the proportions, with m as of this batch."""
        return self.strength * per_proportion(
            peek(self, state, batch.hard_load, batch), self.proportions
        )
