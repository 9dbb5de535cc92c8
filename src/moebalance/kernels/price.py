"""Between the two passes of the fused router: count a batch and form its price, in one launch.

    running ← running + packed,    q = α λ (∇φ(m) − ⟨m, ∇φ(m)⟩) · scale · E / tokens

m (E,) is the average of the steps before; with a peek it includes this batch. In torch every
operation on a vector of E numbers is a kernel of microseconds. A dozen of them would stand between
two passes of some tens of microseconds each; here it is one kernel.

Shapes: E experts; sums are (2E + 2,).
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.kernels.launch import launch
from moebalance.kernels.tiling import next_power
from moebalance.methods import Method, PhiBalancing, Together
from moebalance.methods.base import overrides
from moebalance.methods.ema import Ema
from moebalance.methods.scaled import Scaled
from moebalance.methods.strength import alpha
from moebalance.potentials import Euclidean, NegativeEntropy, Potential

_CHARGING = ("loss_price", "penalty", "penalty_gradient")


class MeanPrice(NamedTuple):
    """A price α λ (∇φ(m) − ⟨m, ∇φ(m)⟩) as data, for a program that forms it in one go.

    Attributes:
        potential: φ.
        mean: m (E,), the average over finished steps.
        weight: (), its accumulated weight; see `methods.ema.Ema`.
        hard: whether m averages the hard load instead of the mean scores.
        peek: whether m includes the batch that is charged.
        strength: α.
        rate: η per step; None for a memory in tokens.
        memory_tokens: M instead of a rate.
        multiplier: λ (); None for 1.
    """

    potential: Potential
    mean: Float[Tensor, "E"]
    weight: Float[Tensor, ""]
    hard: bool
    peek: bool
    strength: float
    rate: float | None
    memory_tokens: float | None = None
    multiplier: Float[Tensor, ""] | None = None


@singledispatch
def mean_price(method: Method, state: Any) -> MeanPrice | None:
    """The price that `method.loss_price` forms, as data; None if it has no such form."""
    return None


@mean_price.register
def _(method: PhiBalancing, state: Any) -> MeanPrice | None:
    if type(method).loss_price is not PhiBalancing.loss_price or not isinstance(state, Ema):
        return None  # a subclass charges otherwise, or the rate adapts
    assert not isinstance(method.rate, str)
    return MeanPrice(
        method.potential,
        state.mean,
        state.weight,
        hard=method.load == "hard",
        peek=method.peek,
        strength=alpha(method, state.mean.shape[-1]),
        rate=method.rate,
        memory_tokens=method.memory_tokens,
    )


@mean_price.register
def _(method: Scaled, state: Any) -> MeanPrice | None:
    price = mean_price(method.method, state.inner)
    if price is None or type(method).loss_price is not Scaled.loss_price:
        return None
    own = method.multiplier(state)
    return price._replace(multiplier=own if price.multiplier is None else price.multiplier * own)


@mean_price.register
def _(method: Together, state: Any) -> MeanPrice | None:
    parts = zip(method.methods, state, strict=True)
    charging = [pair for pair in parts if overrides(pair[0], *_CHARGING)]
    return mean_price(*charging[0]) if len(charging) == 1 else None


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
    """Count a batch and form the charge (E,) on its tokens' scores, in one launch.

    Args:
        price: one that `forms` accepts.
        packed: sums of the batch, (2E + 2,), from `choose`.
        running: sums of the step so far, (2E + 2,); added to in place.
        last_step: (2,) tokens and batches of the last finished step.
        scale: () gradient of the loss with respect to the task loss.
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
            mean if multiplier is None else multiplier,  # any tensor: it is not read
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
