"""The method that `attach` takes if you name none.

A weak φ wakes idle experts through the loss, and a selection price evens out what is left. The rule
that chose it, and the runs: docs/evidence.md, the chapter "One default for all".
"""

from moebalance.methods.base import Method
from moebalance.methods.loss_free import LossFree
from moebalance.methods.phi import PhiBalancing
from moebalance.methods.smebu import SMEBU
from moebalance.methods.together import Together


def recommended(*, native_bias: bool = False, choosable: bool = True) -> Method:
    """The recommended method, in the form that suits the routers.

    Args:
        native_bias: whether every router has a selection bias of its own. Then the price is on the
            scale of that bias, so that the model's own weights hold it.
        choosable: whether a price can change the choice of experts. If it cannot, the method acts
            through the loss alone.

    >>> recommended(native_bias=True).methods[1].scale, recommended(choosable=False).strength
    ('affinity', 0.01)
    """
    if native_bias:
        return Together(PhiBalancing(), SMEBU())
    if choosable:
        return Together(PhiBalancing(), LossFree(scale="nats"))
    return PhiBalancing()
