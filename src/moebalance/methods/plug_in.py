"""Plug-in loss: charge the potential of the load counted in the batch itself, without memory.

    loss = task + α · E · ⟨∇φ(l), p̄⟩,        l: the load of the batch, or of the step so far.

φ-balancing improves on this. By Jensen E[φ(l)] ≥ φ(E[l]), so φ of a batch's load is biased: a batch
that is not representative is still pushed to be even (arXiv 2605.15403, §3). With the Euclidean
potential and the hard load this is the Switch loss, or the global-batch loss over the step so far.
Together with φ-balancing and EMA-Switch it covers {hard, soft} × {batch, step, moving average} ×
{linear, log}, so that a comparison can show which of them helps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, State, Traits, check_positive
from moebalance.methods.strength import Unit, alpha, check_strength
from moebalance.potentials import NegativeEntropy, Potential
from moebalance.routing import Batch, Sums


@dataclass(frozen=True)
class PlugInLoss(Method):
    """Charge ∇φ of the load of the batch, or of the step so far.

    Args:
        potential: convex φ; its gradient is the price.
        strength: ≥ 0, in the unit of a Switch coefficient; see `strength.py`.
        load: "soft" takes the mean scores p̄; "hard" takes the top-k load f, and the gradient still
            goes through the scores.
        window: "batch" for the micro-batch alone, "step" for the step so far, within a process.
        pseudo_count: assignments added to every expert's count for the hard load. A price with a
            pole at an empty expert (negative entropy) needs one in a small batch.
        unit: "switch", or "paper" to read the strength as α.

    Raises:
        TypeError: `potential` is not a `Potential`.
        ValueError: strength, pseudo-count, load or window out of range.

    >>> PlugInLoss(window="step").traits.coupling
    'step'
    """

    potential: Potential = field(default_factory=NegativeEntropy)
    strength: float = 1e-2
    load: Literal["soft", "hard"] = "soft"
    window: Literal["batch", "step"] = "batch"
    pseudo_count: float = 0.5
    unit: Unit = "switch"

    def __post_init__(self) -> None:
        check_strength(self)
        check_positive("pseudo_count", self.pseudo_count)
        if self.load not in ("soft", "hard"):
            raise ValueError(f"load={self.load!r}: must be 'soft' or 'hard'.")
        if self.window not in ("batch", "step"):
            raise ValueError(f"window={self.window!r}: must be 'batch' or 'step'.")

    @property
    def traits(self) -> Traits:
        """The load is that of the window."""
        return super().traits._replace(from_sums=True, coupling=self.window, aim=self.potential.aim)

    def init(self, num_experts: int) -> State:
        """No state."""
        self.potential.check(num_experts)
        alpha(self, num_experts)  # raises where the unit needs a slope that there is not
        return ()

    def loss_price(self, state: State, batch: Batch) -> Float[Tensor, "E"]:
        """α (∇φ(l) − ⟨l, ∇φ(l)⟩), centred as the price of φ-balancing is."""
        load = self._load(batch.step if self.window == "step" else batch.sums)
        price = self.potential.grad(load)
        return alpha(self, load.shape[-1]) * (price - price @ load)

    def _load(self, sums: Sums) -> Float[Tensor, "E"]:
        if self.load == "soft":
            return sums.soft_load
        return sums._replace(counts=sums.counts + self.pseudo_count).hard_load
