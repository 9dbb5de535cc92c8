"""Quantile balancing: set each expert's price so that it admits exactly its part of the tokens.

Let s (T, E) be the affinities or their logarithms, b (E,) the price in force, and α_t the largest
of s_t − b among the experts that token t did not choose: an expert must beat it to be chosen.
Expert e admits its part of the tokens at

    price_e = b_e + the upper K/E quantile over tokens of (s_te − α_t − b_e).

The price is centred and used in the next step; with memory γ it moves γ of the way. With
proportions ρ, K ρ_e replaces K/E. (Limits on groups of experts are ignored.)

The quantile comes from a histogram, which adds exactly over micro-batches and ranks. Its bins lie
around the price in force, spaced as a signed square: they are finest where the quantile is once the
prices have settled.

Source: J. Su, 2026, kexue.fm/archives/11619, which derives the price from the dual of the balanced
assignment; Kimi K3, arXiv 2607.24653, with sigmoid affinities and a histogram. For softmax gates
marin and Megatron-Core (#5349) rank the logits, which is `scale="nats"`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebalance.methods.base import State, check_rate, where_seen
from moebalance.methods.selection import Selecting
from moebalance.proportions import fractions
from moebalance.routing import Routing, Sums

_REACH = {"affinity": 2.0, "nats": 16.0}  # from the price in force; a step can move it no farther


@dataclass(frozen=True, repr=False)
class QuantileBalancing(Selecting):
    """Selection prices from quantiles of the last step.

    Args:
        bins: histogram bins for each expert, at least 2; the sums grow by E · bins numbers.
        memory: γ in (0, 1], the part of the way that the price moves in a step; 1 keeps no memory.
            For example 0.1 averages over about ten steps, for steps of few tokens.
        proportions: (E,) positive, target parts of the load; None for equal parts.
        scale: "affinity" or "nats"; see `Selecting`. Take nats for softmax gates.

    Raises:
        ValueError: bins, memory, scale or proportions out of range.
    """

    bins: int = 1000
    memory: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bins < 2:
            raise ValueError(f"bins={self.bins!r}: must be at least 2.")
        check_rate("memory", self.memory)

    def extra_shapes(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """One histogram (E, bins)."""
        return ((num_experts, self.bins),)

    def extra(self, state: State, routing: Routing) -> tuple[Tensor, ...]:
        """Histogram over tokens of s − α − b, one row for each expert."""
        experts = routing.num_experts
        excess = self.priceable(routing.gate, routing.logits.detach()) - state.price  # (T,E)
        if routing.top_k < experts:
            others = excess.scatter(-1, routing.experts, float("-inf"))
            bar = others.amax(dim=-1, keepdim=True)  # α_t (T,1)
        else:  # every expert is chosen by every token
            bar = excess.amin(dim=-1, keepdim=True)
        # The clamp comes after: NaN becomes an integer far outside. A processor turns floats into
        # int64 one by one, so int32.
        bins = self._compress(excess - bar).int().clamp_(0, self.bins - 1)
        cells = bins.add_(self.bins * torch.arange(experts, device=bins.device, dtype=torch.int32))
        weights = routing.token_weights
        ones = excess.new_ones(()) if weights is None else weights.unsqueeze(-1)
        empty = excess.new_zeros(experts * self.bins)
        filled = empty.index_add(0, cells.reshape(-1), ones.expand_as(cells).reshape(-1))
        return (filled.view(experts, self.bins),)

    def update(self, state: State, sums: Sums) -> State:
        """Read the quantiles, interpolate within a bin, and centre the price."""
        histogram = sums.extra[0].flip(-1)  # from the largest excess down
        above = histogram.cumsum(dim=-1)
        total = sums.counts.sum(dim=-1)  # tokens · K
        if self.proportions is None:
            part = total / sums.counts.shape[-1]
        else:
            part = (total * fractions(self.proportions, sums.counts)).unsqueeze(-1)
        index = (above < part).sum(dim=-1, keepdim=True).clamp(max=self.bins - 1)
        inside = histogram.gather(-1, index)
        before = above.gather(-1, index) - inside
        # clamp: an empty step has empty bins; its result is discarded below.
        fraction = ((part - before) / inside.clamp(min=1)).clamp(0, 1)
        move = self._expand(1 - (index + fraction) / self.bins).squeeze(-1)
        price = state.price + self.memory * move
        price = price - price.mean(dim=-1, keepdim=True)
        return state._replace(price=where_seen(sums.tokens, price, state.price))

    def _compress(self, excess: Tensor) -> Tensor:
        """[−reach, reach] → [0, bins] by the signed square root, a few cheap passes over (T, E)."""
        half = self.bins / 2
        root = excess.abs().mul_(half * half / _REACH[self.scale]).sqrt_()
        return root.copysign_(excess).add_(half)

    def _expand(self, position: Tensor) -> Tensor:
        """[0, 1] → [−reach, reach], the inverse of `_compress` over `bins`."""
        root = 2 * position - 1
        return _REACH[self.scale] * root * root.abs()
