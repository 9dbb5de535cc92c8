"""Quantile balancing: set each expert's price so that it admits exactly its part of the tokens.

With affinities a (T, E) and the current price b (E,), let α_t be the (K+1)-th largest of a_t − b:
an expert must beat it to be chosen by token t. (Limits on groups of experts are ignored.) Expert e
admits its part of the tokens if

    price_e = the upper K/E quantile over tokens of (a_te − α_t).

The prices are centred and used in the next step. With proportions ρ, K ρ_e replaces K/E. The
quantile comes from a histogram, which adds exactly over micro-batches and ranks.

Bins are spaced as a signed cube on [−2, 2], which contains every a − α of affinities in [0, 1].
They are fine near 0, where the quantiles lie, and coarse elsewhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebalance.methods.base import Traits, where_seen
from moebalance.methods.selection import Selecting, SelectionPrice
from moebalance.proportions import Proportions, fractions, settle_proportions
from moebalance.routing import Routing, Sums

_REACH = 2.0


@dataclass(frozen=True, repr=False)
class QuantileBalancing(Selecting):
    """Selection prices from quantiles of the last step, without a rate to tune.

    Args:
        bins: histogram bins for each expert, at least 2; the sums grow by E · bins numbers.
        proportions: (E,) positive, target parts of the load; None for equal parts.

    Raises:
        ValueError: bins or proportions out of range.
    """

    bins: int = 1000
    proportions: Proportions | None = None

    def __post_init__(self) -> None:
        settle_proportions(self)
        if self.bins < 2:
            raise ValueError(f"bins={self.bins!r}: must be at least 2.")

    @property
    def traits(self) -> Traits:
        """The update reads the number of assignments and its histogram."""
        return super().traits._replace(shared=frozenset({"counts"}))

    def extra_shapes(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """One histogram (E, bins)."""
        return ((num_experts, self.bins),)

    def extra(self, state: SelectionPrice, routing: Routing) -> tuple[Tensor, ...]:
        """Histogram over tokens of a − α, (E, bins)."""
        affinities = routing.gate.affinities(routing.logits)
        experts, top_k = routing.num_experts, routing.top_k
        ranked = (affinities - state.price).topk(min(top_k + 1, experts), dim=-1).values
        margin = affinities - ranked[:, -1:]
        position = _compress(margin) * self.bins
        bins = position.long().clamp(0, self.bins - 1)
        cells = bins + self.bins * torch.arange(experts, device=bins.device)
        weights = routing.token_weights
        ones = affinities.new_ones(()) if weights is None else weights.unsqueeze(-1)
        empty = affinities.new_zeros(experts * self.bins)
        filled = empty.scatter_add(0, cells.reshape(-1), ones.expand_as(cells).reshape(-1))
        return (filled.view(experts, self.bins),)

    def update(self, state: SelectionPrice, sums: Sums) -> SelectionPrice:
        """Read the quantiles, interpolate within a bin, and centre them."""
        histogram = sums.extra[0].flip(-1)  # from the largest margin down
        above = histogram.cumsum(dim=-1)
        total = sums.counts.sum(dim=-1)  # tokens · K
        if self.proportions is None:
            share = total / sums.counts.shape[-1]
        else:
            share = (total * fractions(self.proportions, sums.counts)).unsqueeze(-1)
        index = (above < share).sum(dim=-1, keepdim=True).clamp(max=self.bins - 1)
        inside = histogram.gather(-1, index)
        before = above.gather(-1, index) - inside
        # clamp: in an empty step 0 / 0 would be NaN; its result is discarded below.
        fraction = ((share - before) / inside.clamp(min=1)).clamp(0, 1)
        position = 1 - (index + fraction) / self.bins
        price = _expand(position).squeeze(-1)
        price = price - price.mean(dim=-1, keepdim=True)
        return SelectionPrice(where_seen(sums.tokens, price, state.price))


def _compress(margin: Tensor) -> Tensor:
    """[−2, 2] → [0, 1] by the signed cube root."""
    root = torch.sign(margin) * (margin.abs() / _REACH).pow(1 / 3)
    return (root + 1) / 2


def _expand(position: Tensor) -> Tensor:
    """[0, 1] → [−2, 2], the inverse of `_compress`."""
    return _REACH * (2 * position - 1).pow(3)
