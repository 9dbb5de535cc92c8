"""Sequence-wise loss: the Switch loss within each sequence.

    loss = task + α · mean_s E · Σ_e f_e^s P_e^s,

where f^s and P^s are the hard load and the mean normalised score of sequence s. Source:
DeepSeek-AI, 2024, "DeepSeek-V3", arXiv 2412.19437, Eq. 17–20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, State, Traits, check_positive
from moebalance.proportions import Proportions, per_proportion, settle_proportions
from moebalance.routing import Batch


@dataclass(frozen=True, repr=False)
class SequenceLoss(Method):
    """Prevent extreme imbalance within single sequences; usually combined with a selection bias.

    Sequences without a real token are left out of the mean.

    Args:
        strength: α ≥ 0; 1e-4 in DeepSeek-V3.
        proportions: (E,) positive, target parts of the load; None for equal parts.

    Raises:
        ValueError: strength or proportions out of range.
    """

    strength: float = 1e-4
    proportions: Proportions | None = None

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)
        settle_proportions(self)

    @property
    def traits(self) -> Traits:
        """Load and mean score of one sequence are multiplied."""
        return super().traits._replace(coupling="sequence")

    def loss_price(self, state: State, batch: Batch) -> Float[Tensor, "T E"]:
        """α f^s per token of sequence s, weighted so that every sequence counts the same."""
        routing = batch.routing
        tokens, experts, sequences = routing.scores.shape[0], routing.num_experts, routing.sequences
        sequences = max(sequences, 1)  # of a batch without a sequence, (0, S, E)
        length = tokens // sequences
        weights = routing.token_weights
        if weights is None:
            weights = routing.scores.new_ones(tokens)
        real, places = weights.view(sequences, length), length * routing.top_k
        assignments = real.unsqueeze(-1).expand(-1, -1, routing.top_k).reshape(sequences, places)
        chosen = routing.experts.reshape(sequences, places)
        counts = real.new_zeros(sequences, experts).scatter_add(1, chosen, assignments)
        lengths = real.sum(dim=1, keepdim=True)
        # clamp: for a sequence of padding 0 / 0 would be NaN; it has load 0 and no weight.
        load = counts / (lengths * routing.top_k).clamp(min=1)
        present = (lengths > 0).sum().clamp(min=1)
        # The charge divides by all tokens: multiply by them, then divide by the sequence's own.
        fair = batch.sums.tokens / (present * lengths.clamp(min=1))
        price = self.strength * fair * per_proportion(load, self.proportions)
        return torch.repeat_interleave(price, length, dim=0)
