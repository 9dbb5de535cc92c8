"""What the second pass of a fused router does first: count a batch and form its price.

    running ← running + packed,    q = α λ (∇φ(m) − ⟨m, ∇φ(m)⟩) · scale · E / tokens

m (E,) is the average of the steps before; with a peek it includes this batch. In torch every
operation on a vector of E numbers is a kernel of microseconds. A dozen of them would stand between
two passes of some tens of microseconds each; here every program of the second pass does it all.

Shapes: E experts; sums are (2E + 2,).
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any, NamedTuple, TypeGuard

from jaxtyping import Float
from torch import Tensor

from moebalance.kernels.tiling import row_of
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
    """Whether a program can form this price; others are formed in torch.

    >>> forms(None)
    False
    """
    return price is not None and type(price.potential) in (NegativeEntropy, Euclidean)


class Settlement(NamedTuple):
    """A batch to count, and its price to form, inside of the launch that writes the gradient.

    Attributes:
        price: one that `forms` accepts; None to count only.
        packed: sums of the batch, (2E + 2,).
        running: sums of the step so far, (2E + 2,); added to in place.
        last_step: (2,) tokens and batches of the last finished step.
        scale: () gradient of the loss with respect to the task loss.
    """

    price: MeanPrice | None
    packed: Float[Tensor, "sums"]
    running: Float[Tensor, "sums"]
    last_step: Float[Tensor, "2"]
    scale: Float[Tensor, ""]


class Terms(NamedTuple):
    """A charge as arguments of a program.

    Attributes:
        kind: what the program is compiled for; see `options`.
        charge: the first of its tensors that are about the charge.
        others: the rest of these tensors.
        numbers: strength and rate.
    """

    kind: tuple[bool, ...]
    charge: Tensor
    others: tuple[Tensor, ...]
    numbers: tuple[float, float]

    @staticmethod
    def options(kind: tuple[bool, ...]) -> dict[str, bool]:
        """Compile-time arguments of `price_program.settle`."""
        return dict(zip(_FLAGS, kind, strict=True))


_FLAGS = (
    "has_charge", "counts", "forms", "entropy", "hard", "peek", "in_tokens", "has_multiplier",
)  # fmt: skip


def terms(charge: Float[Tensor, "E"] | Settlement | None, logits: Tensor) -> Terms:
    """Tensors, numbers and flags. Where there is nothing to read any tensor stands in."""
    if not isinstance(charge, Settlement):
        kind = (charge is not None, *[False] * 7)
        return Terms(kind, row_of(charge, logits), (logits,) * 7, (0.0, 0.0))
    price, *sums = charge
    if price is None:
        kind = (False, True, *[False] * 6)
        return Terms(kind, logits, (*sums, logits, logits, logits), (0.0, 0.0))
    entropy, in_tokens = type(price.potential) is NegativeEntropy, price.memory_tokens is not None
    multiplier = price.mean if price.multiplier is None else price.multiplier
    kind = (
        True, True, True, entropy, price.hard, price.peek, in_tokens, price.multiplier is not None
    )  # fmt: skip
    rate: Any = price.memory_tokens if in_tokens else price.rate
    others = (*sums, price.mean, price.weight, multiplier)
    return Terms(kind, logits, others, (float(price.strength), float(rate)))
