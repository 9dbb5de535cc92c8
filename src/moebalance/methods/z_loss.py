"""Router z-loss: keep the router's logits small.

    loss = task + β · mean_t logsumexp(z_t)²

It does not balance; it keeps training stable. Combine it with a method that balances:
`Together(PhiBalancing(), ZLoss())`. Source: Zoph et al., 2022, "ST-MoE", arXiv 2202.08906, Eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from moebalance.gates import at_least_float32
from moebalance.methods.base import Method, State, Traits, check_positive
from moebalance.routing import Batch, Routing, real_rows


@dataclass(frozen=True)
class ZLoss(Method):
    """Penalise the squared log-sum-exp of the router's logits.

    Args:
        strength: β ≥ 0; 1e-3 in ST-MoE.

    Raises:
        ValueError: strength out of range.
    """

    strength: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)

    @property
    def traits(self) -> Traits:
        """It steadies the router and does not even out the load."""
        return super().traits._replace(balances=False)

    def penalty(self, state: State, batch: Batch) -> Float[Tensor, ""]:
        """β · mean over real tokens of logsumexp(z)²."""
        squares = _log_partition(batch.routing).square()
        total = real_rows(squares, batch.routing.mask).sum()
        return self.strength * total / batch.routing.tokens.clamp(min=1)

    def penalty_gradient(
        self, state: State, batch: Batch, scale: float | Tensor = 1.0
    ) -> Float[Tensor, "T E"]:
        """2β · logsumexp(z_t) · softmax(z_t) per real token, over their number."""
        routing = batch.routing
        factor = 2 * self.strength * scale / batch.sums.tokens.clamp(min=1)
        rows = factor * _log_partition(routing)
        gradient = rows.unsqueeze(-1) * at_least_float32(routing.logits).softmax(dim=-1)
        return real_rows(gradient, routing.mask)


def _log_partition(routing: Routing) -> Float[Tensor, "T"]:
    return at_least_float32(routing.logits).logsumexp(dim=-1)
