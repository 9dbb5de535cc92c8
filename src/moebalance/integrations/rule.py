"""What a foreign router must offer, and how its rule is recognised from what it does.

A router is recognised by experiment, not by name: run on random input, its logits z, weights w and
experts e are held against the rules in use,

    w = c · a(z)_e        or        w = c · a(z)_e / Σ_chosen a(z),

with a the softmax, the sigmoid or the square root of the softplus of z. So a new model family that
follows a common rule works without a change here, and one that follows none is refused instead of
being misread.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moebalance.gates import Gate, Sigmoid, Softmax, SqrtSoftplus


@dataclass(frozen=True)
class Rule:
    """How a router turns logits into weights.

    Args:
        gate: affinities from logits.
        normalized: whether a token's weights are divided by their sum.
        scaling: the factor c.
        plain_top_k: whether the experts are the K largest affinities; False where groups limit
            the choice.
    """

    gate: Gate
    normalized: bool
    scaling: float
    plain_top_k: bool

    def weigh(
        self, logits: Float[Tensor, "T E"], experts: Int[Tensor, "T K"]
    ) -> Float[Tensor, "T K"]:
        """The weights this router would give to any choice of experts, differentiable.

        >>> rule = Rule(Softmax(), normalized=True, scaling=2.0, plain_top_k=True)
        >>> rule.weigh(torch.zeros(1, 4), torch.tensor([[0, 3]]))
        tensor([[1., 1.]])
        """
        if self.normalized:
            # Of the logarithms: a chosen affinity may be too small to divide by.
            weights = self.gate.log_affinity(logits).gather(-1, experts).softmax(dim=-1)
        else:
            weights = self.gate.affinities(logits).gather(-1, experts)
        return weights * self.scaling


def recognise(
    logits: Float[Tensor, "T E"], weights: Float[Tensor, "T K"], experts: Int[Tensor, "T K"]
) -> Rule | None:
    """Find the rule that gives these weights from these logits; None if none does.

    Args:
        logits: (T, E) from a generic input, with no selection price in force.
        weights: (T, K).
        experts: (T, K).
    """
    for gate in (Softmax(), Sigmoid(), SqrtSoftplus()):
        for normalized in (True, False):
            if normalized and experts.shape[-1] == 1:
                continue  # one weight over itself is 1 under every gate: nothing to learn from
            rule = Rule(gate, normalized, 1.0, plain_top_k=False)
            ratio = weights.float() / rule.weigh(logits, experts)
            scaling = ratio.mean().item()
            if torch.isfinite(ratio).all() and torch.allclose(
                ratio, torch.full_like(ratio, scaling), rtol=1e-4, atol=0
            ):
                best = gate.affinities(logits).topk(experts.shape[-1], dim=-1).indices
                plain = torch.equal(best.sort(dim=-1).values, experts.sort(dim=-1).values)
                # A factor of one shall be exactly one, not the mean of rounding errors.
                scaling = 1.0 if abs(scaling - 1) < 1e-5 else scaling
                return Rule(gate, normalized, scaling, plain)
    return None
