"""φ-balancing: charge the gradient of a potential of the *expected* routing distribution.

Source: Chen et al., "φ-Balancing for Mixture-of-Experts Training", ICML 2026, arXiv 2605.15403,
Eq. 10 and Algorithm 1. To minimise φ(E[p]) over the router is, by convex duality, a min-max
problem. Online mirror ascent solves it with one vector per layer:

    m ← (1 − η) m + η p̄          (p̄: mean pre-top-k score of the step)
    q  = ∇φ(m)                   (no gradient; m already holds this step)
    loss = task + α · E · ⟨q, p̄⟩

The averaging rate η is the dual step size of the mirror ascent. At a given price the term is linear
in p̄, so it adds up over micro-batches; the bilinear Switch loss does not. With `peek=False` the
price is the same for all micro-batches of a step.
"""

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, Traits, check_positive
from moebalance.methods.memory import Memory, Rate, begin, peek, readings, remember, settle_rate
from moebalance.potentials import NegativeEntropy, Potential
from moebalance.routing import Batch, Sums


@dataclass(frozen=True, repr=False)
class PhiBalancing(Method):
    """φ-balancing with any of the nine potentials, or a combination of them.

    Args:
        potential: convex φ; its gradient is the price. `potential.relative_to(proportions)` aims at
            unequal loads, `potential.grouped(groups)` at equal loads of groups.
        strength: α ≥ 0, the weight of the term. At equal α negative entropy pushes E times harder
            than Euclidean; `potential.unit_slope()` removes this difference. The default was chosen
            at E = 32 (docs/defaults.md): with more experts keep α · E near 0.3.
        rate: η in (0, 1], weight of the newest step in the average. The default 0.1 was chosen at
            1024 tokens a step; for steps of 2 million, 0.6 to 0.7 is reported. "auto" measures it
            from the noise of the load (`adaptive.py`). Used if `memory_tokens` is not given.
        load: "soft" averages the scores p̄, as the paper does. "hard" averages the top-k load f;
            the gradient still goes through the scores (straight-through).
        peek: whether the price contains the batch that it is charged on, as in Algorithm 1. For a
            batch with a fraction s of its step's tokens, the price is ∇φ(m + η·s·(p̄ − m)).
            With False the price comes from finished steps only, and is the same for every batch.
        memory_tokens: M > 0 instead of `rate`: a step, or a peek at a batch, of n tokens has
            η = 1 − exp(−n / M).

    Differences from the paper: the price is centred, q − ⟨m, q⟩, which changes no gradient while
    scores sum to one. The average is bias-corrected (`ema.py`), in the peek too.

    Raises:
        TypeError: `potential` is not a `Potential`.
        ValueError: strength, rate, memory or load out of range, or both rate and memory.

    >>> PhiBalancing(peek=False).rate, PhiBalancing(memory_tokens=10_000).rate
    (0.1, None)
    """

    potential: Potential = field(default_factory=NegativeEntropy)
    strength: float = 1e-2
    rate: Rate | None = None
    load: Literal["soft", "hard"] = "soft"
    peek: bool = True
    memory_tokens: float | None = None

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)
        settle_rate(self, default=0.1)
        if self.load not in ("soft", "hard"):
            raise ValueError(f"load={self.load!r}: must be 'soft' or 'hard'.")
        if not isinstance(self.potential, Potential):
            raise TypeError(
                f"potential={self.potential!r}: must be a Potential such as NegativeEntropy()."
            )

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
        return self.strength * (price - price @ mean)

    def _load(self, seen: Sums | Batch) -> Float[Tensor, "E"]:
        return seen.soft_load if self.load == "soft" else seen.hard_load
