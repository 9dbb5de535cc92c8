"""No balancing: the control of every comparison."""

from dataclasses import dataclass

from moebalance.methods.base import Method


@dataclass(frozen=True)
class NoBalancing(Method):
    """Count the load and change nothing."""

    @property
    def from_sums(self) -> bool:
        """Yes."""
        return True
