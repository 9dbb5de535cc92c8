"""Sinkhorn routing: choose by a plan in which all tokens and all experts have equal mass.

The plan π = diag(e^u) exp(a(z)/τ) diag(e^v), (T, E), has unit rows and equal columns. Alternate

    u_t ← −logsumexp_e(a_te/τ + v_e),        v_e ← log(T/E) − logsumexp_t(a_te/τ + u_t)

until it converges. With proportions ρ a column has the mass T ρ_e instead of T/E. Top-k of a row of
π does not depend on u_t, so the choice ranks a(z)/τ + v. This is a selection price −v, made anew
for each batch. Weights stay the router's own. Source: Cuturi, 2013, arXiv 1306.0895 (iteration);
Clark et al., 2022, "S-BASE", arXiv 2202.01169 (routing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Method, State, Traits, check_positive
from moebalance.proportions import Proportions, fractions, settle_proportions


@dataclass(frozen=True, repr=False)
class Sinkhorn(Method):
    """Balance the choice within each training batch; evaluation uses plain top-k.

    It looks at a whole batch before it routes a token, so a token's route depends on its neighbours
    (and, in a causal model, on later tokens).

    Args:
        iterations: number of column updates, at least 1.
        temperature: τ > 0; a lower one stays closer to the router and balances more slowly.
        proportions: (E,) positive, target parts of the load; None for equal parts.

    Raises:
        ValueError: iterations, temperature or proportions out of range.
    """

    iterations: int = 8
    temperature: float = 1.0
    proportions: Proportions | None = None

    def __post_init__(self) -> None:
        settle_proportions(self)
        check_positive("temperature", self.temperature, zero=False)
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r}: must be at least 1.")

    @property
    def traits(self) -> Traits:
        """The plan is made for one batch."""
        return super().traits._replace(coupling="batch")

    def preference(
        self,
        state: State,
        gate: Gate,
        logits: Float[Tensor, "T E"],
        *,
        mask: Bool[Tensor, "T"] | None,
        training: bool,
    ) -> Float[Tensor, "T E"] | None:
        """Log of the plan, up to a constant per token; None in evaluation."""
        if not training:
            return None
        kernel = gate.log_affinity(logits.detach()) / self.temperature
        return kernel + self._column_potential(kernel, mask)

    def _column_potential(
        self, kernel: Float[Tensor, "T E"], mask: Bool[Tensor, "T"] | None
    ) -> Float[Tensor, "E"]:
        """v (E,) after the last iteration, from the real tokens of the batch."""
        if mask is not None:
            # A padded row is −inf in the column sums: it has no mass.
            kernel_columns = kernel.masked_fill(~mask.unsqueeze(-1), -torch.inf)
        else:
            kernel_columns = kernel
        v = kernel.new_zeros(kernel.shape[-1])
        mass: float | Tensor = -math.log(kernel.shape[-1])
        if self.proportions is not None:
            mass = fractions(self.proportions, kernel).log()
        for _ in range(self.iterations):
            u = -(kernel + v).logsumexp(dim=-1, keepdim=True)
            v = mass - (kernel_columns + u).logsumexp(dim=0)
        # log T is left out of the column mass: it is equal for all experts and changes no choice.
        # A batch of padding only has no finite potential, and none of its choices counts.
        return torch.nan_to_num(v, posinf=0.0, neginf=0.0)
