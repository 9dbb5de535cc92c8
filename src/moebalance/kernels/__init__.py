"""Fused forms of the router's arithmetic, each with a plain form in torch.

plain.py     the meaning of the fused router, in a few lines of torch; the tests' oracle
router.py    `choose` forward and `pull_back` backward: for our own router
attached.py  `count` and `pull`, both backward: for a router of another library
price.py     `charge` between two passes: counts a batch and forms its price; its plain form is
             the method's own
tiling.py    `supported`: which inputs fit; and how rows lie in registers
programs.py, attached_programs.py, price_program.py, launch.py
             the Triton programs, and how they start. Triton is optional, so they are imported at
             the first launch.

Shapes: T tokens, E experts, K top-k, L layers, B batch, S sequence; T = B · S.
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
