"""Between the two passes of the fused router: a batch is counted and its price formed, at once.

    running ← running + packed,    q = α (∇φ(m) − ⟨m, ∇φ(m)⟩) · scale · E / tokens

with m the average of the steps before or, with a peek, of this batch as well. In torch that is a
kernel of microseconds for each operation on a vector of E numbers, a dozen and more between two
passes of some tens of microseconds; here it is one, as counting alone would be.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.balancers.base import MeanPrice
from moebalance.kernels.launch import launch
from moebalance.potentials import Euclidean, NegativeEntropy


def forms(price: MeanPrice | None) -> bool:
    """Whether `charge` can form this price; others are formed in torch.

    >>> forms(None), forms(MeanPrice(NegativeEntropy(), 0.1, 0.3, hard=False, peek=True))
    (False, True)
    """
    return price is not None and type(price.potential) in (NegativeEntropy, Euclidean)


def charge(
    price: MeanPrice,
    packed: Float[Tensor, "sums"],
    *,
    mean: Float[Tensor, "E"],
    weight: Float[Tensor, ""],
    running: Float[Tensor, "sums"],
    last_step: Float[Tensor, "2"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, "E"]:
    """Count a batch and say what a token's scores are charged, in one launch.

    Args:
        price: a form that `forms` accepts.
        packed: sums of the batch, (2E + 2,) as `choose` gives them.
        mean: average of the finished steps.
        weight: its accumulated weight.
        running: sums of the step so far; added to in place.
        last_step: tokens and batches of the last finished step.
        scale: gradient of the loss with respect to the task loss.
    """
    num_experts, charged = mean.shape[0], torch.empty_like(mean)
    launch(
        "price_program.charge",
        mean.device,
        1,
        packed,
        running,
        last_step,
        scale,
        mean,
        weight,
        charged,
        price.strength,
        price.rate,
        num_experts=num_experts,
        width=1 << (num_experts - 1).bit_length(),
        entropy=type(price.potential) is NegativeEntropy,
        hard=price.hard,
        peek=price.peek,
    )
    return charged
