"""A loss-lever method whose strength is multiplied by a number that its wrapper keeps.

`Targeted` steers that number by a goal, `Scheduled` sets it by the tokens seen. What they share is
here: the method's own state is `state.inner`, and all that it charges is multiplied alike.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Coupling, MeanPrice, Method
from moebalance.proportions import Proportions
from moebalance.routing import Batch, Routing


@dataclass(frozen=True)
class Scaled(Method):
    """Base of the wrappers; a subclass adds `init`, `update` and `multiplier`.

    Args:
        method: any method that charges in the loss, and does no more.

    Raises:
        TypeError: not a method.
        ValueError: a method without a strength.
    """

    method: Method

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"{type(self).__name__}({self.method!r}, …): give a method first, such as "
                "PhiBalancing()."
            )
        if not self.method.charges or self.method.selects:
            raise ValueError(
                f"{self.method!r} has no strength to steer: give a method that charges in the "
                "loss alone, and compose it with Together afterwards."
            )

    @abstractmethod
    def multiplier(self, state: Any) -> Float[Tensor, ""]:
        """What the method's strength is multiplied by."""

    def charged(self, state: Any, batch: Batch) -> Float[Tensor, "*rows E"] | None:
        """The multiplier times the method's price."""
        price = self.method.charged(state.inner, batch)
        return None if price is None else price * self.multiplier(state)

    def mean_price(self, state: Any) -> MeanPrice | None:
        """The method's, multiplied."""
        price = self.method.mean_price(state.inner)
        if price is None or type(self).charged is not Scaled.charged:
            return None
        own = self.multiplier(state)
        return price._replace(
            multiplier=own if price.multiplier is None else price.multiplier * own
        )

    def penalty(self, state: Any, batch: Batch) -> Float[Tensor, ""] | None:
        """The multiplier times the method's."""
        penalty = self.method.penalty(state.inner, batch)
        return None if penalty is None else penalty * self.multiplier(state)

    def logit_gradient(
        self, state: Any, batch: Batch, scale: float | Tensor = 1.0
    ) -> Float[Tensor, "T E"] | None:
        """The multiplier times the method's."""
        return self.method.logit_gradient(state.inner, batch, scale * self.multiplier(state))

    def extra_shapes(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """The method's."""
        return self.method.extra_shapes(num_experts)

    def extra(self, state: Any, routing: Routing) -> tuple[Tensor, ...]:
        """The method's."""
        return self.method.extra(state.inner, routing)

    def readings(self, state: Any) -> dict[str, Float[Tensor, ""]]:
        """The multiplier, and the method's."""
        return {"multiplier": self.multiplier(state), **self.method.readings(state.inner)}

    @property
    def from_sums(self) -> bool:
        """As the method."""
        return self.method.from_sums

    @property
    def aim(self) -> Proportions | None:
        """That of the method."""
        return self.method.aim

    @property
    def charges(self) -> bool:
        """Yes."""
        return True

    @property
    def reads(self) -> frozenset[str]:
        """What the method reads."""
        return self.method.reads

    @property
    def coupling(self) -> Coupling:
        """As the method."""
        return self.method.coupling
