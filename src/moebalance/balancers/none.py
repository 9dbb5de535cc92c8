"""No balancing: the control every comparison needs."""

from dataclasses import dataclass

from moebalance.balancers.base import Balancer


@dataclass(frozen=True)
class NoBalancing(Balancer):
    """Watch the experts and change nothing."""

    @property
    def from_sums(self) -> bool:
        """Yes."""
        return True
