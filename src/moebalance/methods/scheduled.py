"""A strength, or the speed of a selection price, that follows a schedule in tokens.

    α(n) = α · min(1, n / W) · (1 − (1 − φ) · clip((n − R) / D, 0, 1))

n: tokens that the layer has seen in finished steps; W: length of the warm-up; R: start of the fall;
D: length of the fall; φ: the fraction that is left. For example, DeepSeek-V3 (arXiv 2412.19437,
§4.2) sets its bias speed to 0 for the last 500 of 14 800 billion tokens.

The speed of a selection price follows the same course: of each step's move the price takes the part
α(n)/α. So a warm-up starts slowly, and a floor of 0 freezes the price, which stays in force.

Tokens make the schedule independent of batch size, accumulation and number of ranks. All
micro-batches of a step use one strength, from the tokens before the step. So the schedule adds no
coupling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Method, beyond, check_positive, forwarded
from moebalance.methods.scaled import Scaled
from moebalance.methods.selection import Selecting
from moebalance.routing import Sums


class Progress(NamedTuple):
    """State of the inner method, and the tokens seen (), float32.

    After S equal steps the count is off by at most a fraction S / 2²⁵. After some 10⁷ steps it
    stops, because adding one step changes nothing.
    """

    inner: Any
    tokens: Float[Tensor, ""]

    def problem(self) -> str:
        """What no counting leaves behind; empty if nothing."""
        return beyond("its number of tokens", self.tokens, most=1e15, least=0.0)


@dataclass(frozen=True)
class Scheduled(Scaled):
    """A method with a scheduled strength, or with a scheduled speed of its selection price.

    Args:
        method: a method that charges in the loss, or one that keeps a selection price. Its own
            strength or speed is the full one.
        warmup_tokens: W ≥ 0, over which the strength rises from 0; 0 starts at full strength.
        relax_after: R ≥ W, tokens after which it falls; None for never.
        relax_tokens: D ≥ 0, over which it falls; 0 for at once.
        floor: φ in [0, 1], the fraction of the strength that is left.

    Raises:
        TypeError: not a method.
        ValueError: a number out of range, or a method without strength and without speed.

    >>> from moebalance.methods.phi import PhiBalancing
    >>> method = Scheduled(PhiBalancing(), warmup_tokens=1000, relax_after=4000, relax_tokens=1000)
    >>> [method.factor(torch.tensor(n)).item() for n in (0.0, 500.0, 3000.0, 4500.0, 9000.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    warmup_tokens: float = 0.0
    relax_after: float | None = None
    relax_tokens: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("warmup_tokens", self.warmup_tokens)
        check_positive("relax_tokens", self.relax_tokens)
        check_positive("floor", self.floor)
        if self.floor > 1:
            raise ValueError(
                f"floor={self.floor!r}: must be a fraction of the strength, from 0 to 1."
            )
        if self.relax_after is None:
            if self.relax_tokens or self.floor:
                raise ValueError(
                    f"relax_tokens={self.relax_tokens!r} and floor={self.floor!r} say how the "
                    "strength falls: also give relax_after, the tokens after which it falls."
                )
        else:
            check_positive("relax_after", self.relax_after)
            if self.relax_after < self.warmup_tokens:
                raise ValueError(
                    f"relax_after={self.relax_after!r} lies within "
                    f"warmup_tokens={self.warmup_tokens!r}: relax after the warm-up."
                )

    def init(self, num_experts: int) -> Progress:
        """No token seen."""
        return Progress(self.method.init(num_experts), torch.zeros((), dtype=torch.float32))

    def update(self, state: Progress, sums: Sums) -> Progress:
        """Advance the inner method, and count tokens."""
        tokens = state.tokens + sums.tokens.to(state.tokens.dtype)
        inner = self.method.update(state.inner, sums)
        if isinstance(self.method, Selecting):
            part = self.factor(state.tokens)
            inner = self.method.priced(inner, torch.lerp(state.inner.price, inner.price, part))
        return Progress(inner, tokens)

    def held(self, before: Progress, after: Progress) -> Progress:
        """The schedule goes on, and the inner method holds what it has to."""
        return after._replace(inner=self.method.held(before.inner, after.inner))

    def selection_price(self, state: Progress) -> Float[Tensor, "E"] | None:
        """The method's own."""
        return self.method.selection_price(state.inner)

    def price_in_nats(self, state: Progress) -> Float[Tensor, "E"] | None:
        """The method's own."""
        return self.method.price_in_nats(state.inner)

    @forwarded
    def preference(
        self,
        state: Progress,
        gate: Gate,
        logits: Float[Tensor, "T E"],
        *,
        mask: Bool[Tensor, "T"] | None,
        training: bool,
    ) -> Float[Tensor, "T E"] | None:
        """The method's own."""
        return self.method.preference(state.inner, gate, logits, mask=mask, training=training)

    def adopt(self, state: Progress, price: Float[Tensor, "E"]) -> Progress:
        """Hand the price to the method."""
        return state._replace(inner=self.method.adopt(state.inner, price))

    @staticmethod
    def _accepts(method: Method) -> bool:
        return Scaled._accepts(method) or isinstance(method, Selecting)

    def multiplier(self, state: Progress) -> Float[Tensor, ""]:
        """The part of the strength in force."""
        return self.factor(state.tokens)

    def factor(self, tokens: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The part of the strength in force after so many tokens."""
        factor = torch.ones_like(tokens)
        if self.warmup_tokens:
            factor = (tokens / self.warmup_tokens).clamp(max=1.0)
        if self.relax_after is not None:
            # "At once" means over half a token: no division by 0.
            fallen = (tokens - self.relax_after) / max(self.relax_tokens, 0.5)
            factor = factor * (1 - (1 - self.floor) * fallen.clamp(0.0, 1.0))
        return factor
