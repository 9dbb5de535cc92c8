"""Set the balance you want instead of a strength: a controller on a method's strength.

It minimises the task loss subject to v(load) ≤ v*, where v measures unevenness. λ, the multiplier
of that constraint, scales the method's strength. It moves once a step, for each layer separately:

    l ← (1 − η) l + η f                             the load, averaged
    r = clip(v(l) / v*, 1/e, e)                     unevenness, in multiples of the goal
    log λ ← clip(log λ + κ h log r)                 exponentiated dual ascent, from λ = 1
    strength ← min(r, 1) λ · the method's own

- λ moves in the logarithm, because the right strength differs by orders of magnitude between
  layers, models and stages of training. r is clipped, so that one bad step does little. λ is
  clipped at `ceiling`, so that a goal out of reach cannot wind it up. At its lower end λ is 0: a
  layer that is balanced anyway is left alone.
- min(r, 1) brakes where the load is more even than needed. λ alone would oscillate: it is an
  integral, and the router that it steers is nearly one too. r does not push, because a young router
  misses every goal, and a strength that responds at once costs loss (docs/targets.md).
- h in [0, 1] holds λ while the load is already moving toward the goal. A router takes hundreds of
  steps however hard it is pushed (Adam divides by the size of the gradient), and λ would wind up
  all that time. h is 1 while log v is steady, and 0 when it moves toward the goal by a tenth or
  more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import (
    Method,
    Traits,
    beyond,
    check_positive,
    check_rate,
    where_seen,
)
from moebalance.methods.ema import Ema
from moebalance.methods.goals import Goal
from moebalance.methods.scaled import Scaled
from moebalance.routing import Sums

_FLOOR = 1e-2  # of the method's own strength; counts as 0
_MOST = 1e6  # λ beyond it is no strength any more
_OFF = 1e-3  # for rounding
_LEAST = 0.1  # of the goal: loads that are more even than this count the same
_LATELY = 0.01  # rate of the recent log v: about 100 steps
_MOVING = 0.1  # change of log v at which λ is held completely


class Steered(NamedTuple):
    """State of the inner method, averaged load, recent log v (), log λ () and min(r, 1) λ ().

    λ is relative to the method's own strength.
    """

    inner: Any
    load: Ema
    lately: Float[Tensor, ""]
    log_dual: Float[Tensor, ""]
    multiplier: Float[Tensor, ""]

    def problem(self) -> str:
        """What no steering leaves behind; empty if nothing."""
        least, most = log(_FLOOR) - _OFF, log(_MOST) + _OFF
        found = beyond("its log λ", self.log_dual, most=most, least=least)
        found = found or beyond(
            "its recent log v", self.lately, most=100.0, least=log(_LEAST) - _OFF
        )
        highest = self.log_dual.exp().item() * (1 + _OFF)
        return found or beyond("its multiplier", self.multiplier, most=highest, least=0.0)


@dataclass(frozen=True)
class Targeted(Scaled):
    """A method that charges in the loss, with a strength steered to a goal, layer by layer.

    Args:
        method: any method that balances by a charge in the loss. λ starts at 1, its own strength.
        goal: for example `MaxVio(0.3)`. A goal without proportions takes the method's.
        gain: κ > 0, the most that log λ moves in a step; 0.01 takes 230 steps for a factor of ten.
        rate: η in (0, 1] of the averaged load. Its sampling noise must lie well below the goal:
            see `metrics.sampling_floor` for (2 − η) / η steps' tokens.
        ceiling: the largest λ, from 1 to 1e6. The smallest is a hundredth, and counts as 0.

    Raises:
        TypeError: something else than a method, or than a goal.
        ValueError: the method does not balance by a charge in the loss alone, or a number is out of
            range.

    >>> from moebalance.methods.goals import MaxVio
    >>> from moebalance.methods.phi import PhiBalancing
    >>> Targeted(PhiBalancing(load="hard"), MaxVio(0.3)).traits.coupling
    'batch'
    """

    goal: Goal
    gain: float = 0.01
    rate: float = 0.05
    ceiling: float = 30.0
    _needs: ClassVar[str] = "a goal of the load steers a strength that balances it"

    @staticmethod
    def _accepts(method: Method) -> bool:
        return Scaled._accepts(method) and method.traits.balances

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.goal, Goal):
            raise TypeError(
                f"Targeted({self.method!r}, {self.goal!r}): give a method and a goal, such as "
                "Targeted(PhiBalancing(), MaxVio(0.3))."
            )
        if self.goal.proportions is None and self.method.traits.aim is not None:
            object.__setattr__(self, "goal", replace(self.goal, proportions=self.method.traits.aim))
        check_positive("gain", self.gain, zero=False)
        check_positive("ceiling", self.ceiling, zero=False)
        if self.ceiling < 1:
            raise ValueError(
                f"ceiling={self.ceiling!r}: must be at least 1, where λ starts. For less, give the "
                "method a smaller strength."
            )
        if self.ceiling > _MOST:
            raise ValueError(
                f"ceiling={self.ceiling!r}: must be at most 1e6. For more, give the method a "
                "larger strength."
            )
        check_rate("rate", self.rate)

    @property
    def traits(self) -> Traits:
        """The method's own; the update reads the goal's load too."""
        own = self.method.traits
        return own._replace(shared=own.shared | {self.goal.reads})

    def init(self, num_experts: int) -> Steered:
        """λ = 1: the method's own strength."""
        load = Ema.empty(num_experts)
        self.goal.measure(load.mean)  # raises if the goal does not fit the layer
        zero, one = torch.zeros((), dtype=torch.float32), torch.ones((), dtype=torch.float32)
        return Steered(self.method.init(num_experts), load, zero, zero, one)

    def update(self, state: Steered, sums: Sums) -> Steered:
        """Advance the inner method and the averaged load, then λ and its brake."""
        seen = (sums.tokens > 0).to(state.multiplier.dtype)
        first = state.load.weight < self.rate / 2  # after one step it is the rate itself
        load = state.load.toward(self.goal.of(sums), self.rate * seen)
        now = self.goal.ratio(load.mean).clamp(min=_LEAST).log()
        lately = torch.where(first, now, state.lately + _LATELY * (now - state.lately))
        miss = now.clamp(-1.0, 1.0)
        held = (1 - (lately - now) * miss.sign() / _MOVING).clamp(0.0, 1.0)
        dual = state.log_dual + self.gain * held * miss
        dual = dual.clamp(log(_FLOOR), log(self.ceiling))
        braked = (dual + miss.clamp(max=0.0)).exp()
        multiplier = torch.where(dual > log(_FLOOR), braked, 0.0)
        return Steered(
            self.method.update(state.inner, sums),
            load,
            where_seen(sums.tokens, lately, state.lately),
            where_seen(sums.tokens, dual, state.log_dual),
            where_seen(sums.tokens, multiplier, state.multiplier),
        )

    def held(self, before: Steered, after: Steered) -> Steered:
        """The multiplier stays: the load that it saw was not the router's."""
        return before._replace(inner=self.method.held(before.inner, after.inner))

    def multiplier(self, state: Steered) -> Float[Tensor, ""]:
        """min(r, 1) λ, (), relative to the method's strength; 0 at the lower end of λ."""
        return state.multiplier
