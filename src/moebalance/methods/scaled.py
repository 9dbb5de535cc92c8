"""A method whose charge in the loss is multiplied by a number that its wrapper keeps.

`Targeted` steers the number by a goal, `Scheduled` sets it from the tokens seen. For both,
`state.inner` is the method's own state, and the number multiplies all that it charges.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from moebalance.methods.base import Method, Traits, inner_methods
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
    _needs: ClassVar[str] = "it has no strength to steer"
    _instead: ClassVar[str] = (
        "Give a method that charges in the loss alone, such as PhiBalancing(), and compose it with "
        "others by Together afterwards."
    )

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"{type(self).__name__}({self.method!r}, …): give a method first, such as "
                "PhiBalancing()."
            )
        if not self._accepts(self.method):
            wrapper, several = type(self).__name__, len(inner_methods(self.method)) > 1
            raise ValueError(
                f"{wrapper}({self.method!r}, …): {self._needs}. "
                + (f"Wrap its parts: Together({wrapper}(…), …)." if several else self._instead)
            )

    @staticmethod
    def _accepts(method: Method) -> bool:
        return method.traits.charges and not method.traits.selects

    @property
    def traits(self) -> Traits:
        """The inner method's."""
        return self.method.traits

    @abstractmethod
    def multiplier(self, state: Any) -> Float[Tensor, ""]:
        """The factor () on the strength."""

    def loss_price(self, state: Any, batch: Batch) -> Float[Tensor, "*rows E"] | None:
        """The multiplier times the method's price."""
        price = self.method.loss_price(state.inner, batch)
        return None if price is None else price * self.multiplier(state)

    def penalty(self, state: Any, batch: Batch) -> Float[Tensor, ""] | None:
        """The multiplier times the inner method's."""
        penalty = self.method.penalty(state.inner, batch)
        return None if penalty is None else penalty * self.multiplier(state)

    def penalty_gradient(
        self, state: Any, batch: Batch, scale: float | Tensor = 1.0
    ) -> Float[Tensor, "T E"] | None:
        """The multiplier times the inner method's."""
        return self.method.penalty_gradient(state.inner, batch, scale * self.multiplier(state))

    def extra_shapes(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """The inner method's."""
        return self.method.extra_shapes(num_experts)

    def extra(self, state: Any, routing: Routing) -> tuple[Tensor, ...]:
        """The inner method's."""
        return self.method.extra(state.inner, routing)

    def readings(self, state: Any) -> dict[str, Float[Tensor, ""]]:
        """The multiplier, and the inner method's readings."""
        return {"multiplier": self.multiplier(state), **self.method.readings(state.inner)}
