"""Fused forms of the router's arithmetic, each beside its plain form.

plain.py     what the fused router means, in a few lines of torch; the tests' oracle
router.py    `choose` forward and `pull_back` backward: a router of ours
attached.py  `count` and `pull`, both backward: what is attached to a router of somebody else's
price.py     `charge` between two passes: a batch counted and its price formed; its plain form is
             the method's own `charged`
tiling.py    `supported`, which says when, and how rows lie in registers
programs.py, attached_programs.py, price_program.py, launch.py
             the Triton programs, and how they are started: not before the first launch are they
             imported, for Triton is optional
"""

from moebalance.kernels.attached import count, pull
from moebalance.kernels.plain import Chosen
from moebalance.kernels.price import charge, forms, mean_price
from moebalance.kernels.router import choose, pull_back
from moebalance.kernels.tiling import supported

__all__ = [
    "Chosen",
    "charge",
    "choose",
    "count",
    "forms",
    "mean_price",
    "pull",
    "pull_back",
    "supported",
]
