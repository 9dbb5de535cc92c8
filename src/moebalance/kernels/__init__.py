"""Fused forms of the router's arithmetic, each with a plain form in torch.

plain.py     the meaning of the fused router, in a few lines of torch; the tests' oracle
router.py    `choose` forward and `pull_back` backward: for our own router
attached.py  `count` and `pull`, both backward: for a router of another library
price.py     `Settlement`: a batch that the second pass counts, and the price that it forms; its
             plain form is the method's own
tiling.py    `supported`: which inputs fit; and how rows lie in registers
*program.py, *programs.py, launch.py
             the Triton programs, and how they start. Triton is optional, so they are imported at
             the first launch.

Shapes: T tokens, E experts, K top-k, L layers, B batch, S sequence; T = B · S.
"""

from moebalance.kernels.attached import count, pull
from moebalance.kernels.plain import Chosen
from moebalance.kernels.price import Settlement, forms, mean_price
from moebalance.kernels.router import choose, pull_back
from moebalance.kernels.tiling import new_tickets, supported

__all__ = [
    "Chosen",
    "Settlement",
    "choose",
    "count",
    "forms",
    "mean_price",
    "new_tickets",
    "pull",
    "pull_back",
    "supported",
]
