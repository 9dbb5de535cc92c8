"""Switch / GShard / ST-MoE auxiliary loss: hard load of the batch times mean score.

    loss = task + α · E · Σ_e f_e P_e

f_e: fraction of this batch's assignments that went to expert e (no gradient); P_e: mean score. With
proportions ρ, f_e / (E ρ_e) replaces f_e; the loss is then least at f = P = ρ. Source: Fedus et
al., 2021, arXiv 2101.03961, Eq. 4–6; Zoph et al., 2022, arXiv 2202.08906.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, State, Traits, check_positive
from moebalance.proportions import Proportions, per_proportion, settle_proportions
from moebalance.routing import Batch


@dataclass(frozen=True, repr=False)
class SwitchLoss(Method):
    """The auxiliary loss that most models are trained with.

    It is bilinear in one batch's statistics. So its effect changes when you split a step into
    micro-batches or over ranks, and a batch from one domain is pushed to use all experts.

    Args:
        strength: α ≥ 0; 1e-2 in Switch, 1e-3 in Qwen. Here f sums to one. Transformers' function
            counts each of the K assignments as a whole, so its loss is K times this one.
        proportions: (E,) positive, target parts of the load; None for equal parts.

    Raises:
        ValueError: strength or proportions out of range.
    """

    strength: float = 1e-2
    proportions: Proportions | None = None

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)
        settle_proportions(self)

    @property
    def traits(self) -> Traits:
        """The batch's load and mean score are multiplied."""
        return super().traits._replace(from_sums=True, coupling="batch")

    def loss_price(self, state: State, batch: Batch) -> Float[Tensor, "E"]:
        """α f, the hard load of this batch, per share."""
        return self.strength * per_proportion(batch.sums.hard_load, self.proportions)
