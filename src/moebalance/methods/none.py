"""No balancing: the control every comparison needs."""

from dataclasses import dataclass

from moebalance.methods.base import Method


@dataclass(frozen=True)
class NoBalancing(Method):
    """Watch the experts and change nothing."""

    @property
    def from_sums(self) -> bool:
        """Yes."""
        return True
