"""φ-balancing: charge the gradient of a potential of the *expected* routing distribution.

Source: Chen et al., "φ-Balancing for Mixture-of-Experts Training", ICML 2026, arXiv 2605.15403,
Eq. 10 and Algorithm 1. To minimise φ(E[p]) over the router is, by convex duality, a min-max
problem. Online mirror ascent solves it with one vector per layer:

    m ← (1 − η) m + η p̄          (p̄: mean pre-top-k score of the step)
    q  = ∇φ(m)                   (no gradient; m already holds this step)
    loss = task + α · E · ⟨q, p̄⟩,        α = strength / slope of ∇φ at 1/E (`strength.py`)

The averaging rate η is the dual step size of the mirror ascent. At a given price the term is linear
in p̄, so it adds up over micro-batches; the bilinear Switch loss does not. With `peek=False` the
price is the same for all micro-batches of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, Traits
from moebalance.methods.memory import Memory, Rate, begin, peek, readings, remember, settle_memory
from moebalance.methods.strength import Unit, alpha, check_strength
from moebalance.potentials import NegativeEntropy, Potential
from moebalance.routing import Batch, Sums


@dataclass(frozen=True, repr=False)
class PhiBalancing(Method):
    """φ-balancing with any of the nine potentials, or a combination of them.

    Args:
        potential: convex φ; its gradient is the price. `potential.relative_to(proportions)` aims at
            unequal loads, `potential.grouped(groups)` at equal loads of groups.
        strength: ≥ 0. Near the uniform load it pushes as the Switch loss does with a coefficient of
            this number, for any potential and E; see `unit`.
        rate: η in (0, 1] instead of `memory_tokens`: weight of the newest step in the average. For
            steps of 2 million tokens 0.6 to 0.7 is reported. "auto" measures it from the noise of
            the load (`adaptive.py`).
        load: "soft" averages the scores p̄, as the paper does. "hard" averages the top-k load f;
            the gradient still goes through the scores (straight-through).
        peek: whether the price contains the batch that it is charged on, as in Algorithm 1. For a
            batch with a fraction s of its step's tokens, the price is ∇φ(m + η·s·(p̄ − m)).
            With False the price comes from finished steps only, and is the same for every batch.
        memory_tokens: M > 0: a step, or a peek at a batch, of n tokens has η = 1 − exp(−n / M). So
            a setting means the same at another batch size. 10,000 if no rate is given.
        unit: "switch", or "paper" to read the strength as Algorithm 1's α. Negative entropy then
            pushes E times harder than Euclidean or a Switch loss at the same number.

    Differences from the paper: the price is centred, q − ⟨m, q⟩, which changes no gradient while
    scores sum to one. The average is bias-corrected (`ema.py`), in the peek too.

    Raises:
        TypeError: `potential` is not a `Potential`.
        ValueError: strength, rate, memory, load or unit out of range, or both rate and memory.

    >>> PhiBalancing().memory_tokens, PhiBalancing(rate=0.1).memory_tokens
    (10000.0, None)
    """

    potential: Potential = field(default_factory=NegativeEntropy)
    strength: float = 1e-2
    rate: Rate | None = None
    load: Literal["soft", "hard"] = "soft"
    peek: bool = True
    memory_tokens: float | None = None
    unit: Unit = "switch"

    def __post_init__(self) -> None:
        check_strength(self)
        settle_memory(self)
        if self.load not in ("soft", "hard"):
            raise ValueError(f"load={self.load!r}: must be 'soft' or 'hard'.")

    @property
    def traits(self) -> Traits:
        """With the peek each batch is part of its own price."""
        return super().traits._replace(
            from_sums=True,
            shared=frozenset({"scores" if self.load == "soft" else "counts"}),
            coupling="batch" if self.peek else "token",
            aim=self.potential.aim,
        )

    def readings(self, state: Memory) -> dict[str, Float[Tensor, ""]]:
        """The rate, where it adapts."""
        return readings(state)

    def init(self, num_experts: int) -> Memory:
        """An empty average."""
        self.potential.check(num_experts)
        alpha(self, num_experts)  # raises where the unit needs a slope that there is not
        return begin(self, num_experts)

    def update(self, state: Memory, sums: Sums) -> Memory:
        """m ← (1 − η) m + η p̄, once per optimizer step."""
        return remember(self, state, self._load(sums), sums.tokens)

    def loss_price(self, state: Memory, batch: Batch) -> Float[Tensor, "E"]:
        """α (∇φ(m) − ⟨m, ∇φ(m)⟩) with m as of this batch."""
        mean = state.mean
        if self.peek:
            mean = peek(self, state, self._load(batch), batch)
        price = self.potential.grad(mean)
        return alpha(self, mean.shape[-1]) * (price - price @ mean)

    def _load(self, seen: Sums | Batch) -> Float[Tensor, "E"]:
        return seen.soft_load if self.load == "soft" else seen.hard_load
