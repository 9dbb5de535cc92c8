"""Fused forms of the router's arithmetic, each beside its plain form.

plain.py     what the fused router means, in a few lines of torch; the tests' oracle
router.py    `choose` forward and `pull_back` backward, and `supported`, which says when
price.py     `charge` between the two: a batch counted and its price formed; its plain form is the
             method's own `charged`
programs.py, price_program.py, launch.py
             the Triton programs, and how they are started: not before the first launch are they
             imported, for Triton is optional
"""

from moebalance.kernels.plain import Chosen, Groups
from moebalance.kernels.price import charge, forms
from moebalance.kernels.router import choose, pull_back, supported

__all__ = ["Chosen", "Groups", "charge", "choose", "forms", "pull_back", "supported"]
