"""Between the two passes of the fused router: a batch is counted and its price formed, at once.

    running ← running + packed,    q = α λ (∇φ(m) − ⟨m, ∇φ(m)⟩) · scale · E / tokens

with m the average of the steps before or, with a peek, of this batch as well. In torch that is a
kernel of microseconds for each operation on a vector of E numbers, a dozen and more between two
passes of some tens of microseconds; here it is one, as counting alone would be.
"""

from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.kernels.launch import launch
from moebalance.kernels.tiling import next_power
from moebalance.methods.base import MeanPrice
from moebalance.potentials import Euclidean, NegativeEntropy


def forms(price: MeanPrice | None) -> TypeGuard[MeanPrice]:
    """Whether `charge` can form this price; others are formed in torch.

    >>> forms(None)
    False
    """
    return price is not None and type(price.potential) in (NegativeEntropy, Euclidean)


def charge(
    price: MeanPrice,
    packed: Float[Tensor, "sums"],
    running: Float[Tensor, "sums"],
    last_step: Float[Tensor, "2"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, "E"]:
    """Count a batch and say what a token's scores are charged, in one launch.

    Args:
        price: one that `forms` accepts.
        packed: sums of the batch, (2E + 2,) as `choose` gives them.
        running: sums of the step so far; added to in place.
        last_step: tokens and batches of the last finished step.
        scale: gradient of the loss with respect to the task loss.
    """
    mean, multiplier = price.mean, price.multiplier
    num_experts, charged = mean.shape[0], torch.empty_like(mean)
    launch(
        "price_program.charge",
        1,
        (
            packed,
            running,
            last_step,
            scale,
            mean,
            price.weight,
            mean if multiplier is None else multiplier,  # any tensor, which is not read
            charged,
        ),
        float(price.strength),
        float(price.rate if price.memory_tokens is None else price.memory_tokens),  # type: ignore[arg-type]
        num_experts=num_experts,
        width=next_power(num_experts),
        entropy=type(price.potential) is NegativeEntropy,
        hard=price.hard,
        peek=price.peek,
        in_tokens=price.memory_tokens is not None,
        has_multiplier=multiplier is not None,
    )
    return charged
