"""No balancing: the control of every comparison."""

from dataclasses import dataclass

from moebalance.methods.base import Method, Traits


@dataclass(frozen=True)
class NoBalancing(Method):
    """Count the load and change nothing."""

    @property
    def traits(self) -> Traits:
        """Counted the fast way."""
        return super().traits._replace(from_sums=True)
