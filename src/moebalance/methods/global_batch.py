"""Global-batch loss: the Switch loss with the load of the whole step.

    loss = task + α · E · Σ_e f_e^step P_e,

where f^step sums over the step's micro-batches so far. Source: Qiu et al., 2025, arXiv 2501.11873;
this follows their buffer over accumulation steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, State, Traits, check_positive
from moebalance.proportions import Proportions, per_proportion, settle_proportions
from moebalance.routing import Batch


@dataclass(frozen=True, repr=False)
class GlobalBatchLoss(Method):
    """Switch loss on the load of the step instead of the micro-batch.

    The first micro-batch of a step sees only itself; the last one sees the whole step.

    Args:
        strength: α ≥ 0; 1e-3 in the paper's models.
        proportions: (E,) positive, target parts of the load; None for equal parts.

    Raises:
        ValueError: strength or proportions out of range.
    """

    strength: float = 1e-3
    proportions: Proportions | None = None

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)
        settle_proportions(self)

    @property
    def traits(self) -> Traits:
        """A batch sees the step so far, within its process."""
        return super().traits._replace(from_sums=True, coupling="step")

    def loss_price(self, state: State, batch: Batch) -> Float[Tensor, "E"]:
        """α f, the hard load of the step so far, per share."""
        return self.strength * per_proportion(batch.step.hard_load, self.proportions)
