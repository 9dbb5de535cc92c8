"""Fused forms of the router's arithmetic, each beside its plain form.

plain.py     what the fused router means, in a few lines of torch; the tests' oracle
router.py    `choose` forward and `pull_back` backward, and `supported`, which says when
programs.py  the Triton programs; imported at the first launch, for Triton is optional
"""

from moebalance.kernels.plain import Chosen, Groups
from moebalance.kernels.router import choose, pull_back, supported

__all__ = ["Chosen", "Groups", "choose", "pull_back", "supported"]
