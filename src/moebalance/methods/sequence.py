"""Sequence-wise auxiliary loss: the Switch loss within each sequence.

    loss = task + α · mean_s E · Σ_e f_e^s P_e^s,

f^s and P^s taken over the tokens of sequence s, on normalised scores. Source: DeepSeek-AI, 2024,
"DeepSeek-V3", arXiv 2412.19437, Eq. 17–20.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, State, Traits, check_positive
from moebalance.proportions import Proportions, per_proportion, settle_proportions
from moebalance.routing import Batch


@dataclass(frozen=True, repr=False)
class SequenceLoss(Method):
    """Guard against extreme imbalance within single sequences; usually together with a bias method.

    Sequences without a real token are left out of the mean.

    Args:
        strength: α ≥ 0; 1e-4 in DeepSeek-V3.
        proportions: (E,) positive, the part of the load of each expert; None for equal parts.
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
        length = tokens // sequences
        weights = routing.token_weights
        if weights is None:
            weights = routing.scores.new_ones(tokens)
        real = weights.view(sequences, length)
        assignments = real.unsqueeze(-1).expand(-1, -1, routing.top_k).reshape(sequences, -1)
        chosen = routing.experts.reshape(sequences, -1)
        counts = real.new_zeros(sequences, experts).scatter_add(1, chosen, assignments)
        lengths = real.sum(dim=1, keepdim=True)
        # clamp: a sequence of padding has load 0 and no say, not 0/0.
        load = counts / (lengths * routing.top_k).clamp(min=1)
        present = (lengths > 0).sum().clamp(min=1)
        # The charge divides by all tokens; undo that, then divide by this sequence's own.
        fair = batch.sums.tokens / (present * lengths.clamp(min=1))
        price = self.strength * fair * per_proportion(load, self.proportions)
        return torch.repeat_interleave(price, length, dim=0)
