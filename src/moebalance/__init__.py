"""moebalance: load balancing for Mixture-of-Experts training.

φ-balancing (Chen et al., ICML 2026, arXiv 2605.15403) and its rivals behind one interface.

Here are the names that you type. Everything else is in a submodule: `mb.potentials`, `mb.methods`,
`mb.gates`, `mb.metrics`, `mb.routing`, `mb.huggingface`. Names are imported on first use: the
report and the command line start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebalance import gates as gates
    from moebalance import methods as methods
    from moebalance import metrics as metrics
    from moebalance import potentials as potentials
    from moebalance import routing as routing
    from moebalance.attachment import attach as attach
    from moebalance.core.handle import Balancing as Balancing
    from moebalance.core.state import plain_state_dict as plain_state_dict
    from moebalance.gates import GroupLimit as GroupLimit
    from moebalance.gates import Sigmoid as Sigmoid
    from moebalance.gates import Softmax as Softmax
    from moebalance.gates import SqrtSoftplus as SqrtSoftplus
    from moebalance.integrations import huggingface as huggingface
    from moebalance.methods import SMEBU as SMEBU
    from moebalance.methods import EmaSwitchLoss as EmaSwitchLoss
    from moebalance.methods import GlobalBatchLoss as GlobalBatchLoss
    from moebalance.methods import LossFree as LossFree
    from moebalance.methods import MaxVio as MaxVio
    from moebalance.methods import Method as Method
    from moebalance.methods import NoBalancing as NoBalancing
    from moebalance.methods import PhiBalancing as PhiBalancing
    from moebalance.methods import PlugInLoss as PlugInLoss
    from moebalance.methods import QuantileBalancing as QuantileBalancing
    from moebalance.methods import Scheduled as Scheduled
    from moebalance.methods import SequenceLoss as SequenceLoss
    from moebalance.methods import Sinkhorn as Sinkhorn
    from moebalance.methods import SwitchLoss as SwitchLoss
    from moebalance.methods import Targeted as Targeted
    from moebalance.methods import Together as Together
    from moebalance.methods import ZLoss as ZLoss
    from moebalance.methods import recommended as recommended
    from moebalance.monitoring import Monitor as Monitor
    from moebalance.monitoring import monitor as monitor
    from moebalance.per_class import PerClassRouter as PerClassRouter
    from moebalance.potentials import Euclidean as Euclidean
    from moebalance.potentials import NegativeEntropy as NegativeEntropy
    from moebalance.router import BalancedRouter as BalancedRouter
    from moebalance.router import CountAndCharge as CountAndCharge

__version__ = "0.1.0"

_HOME = {
    "moebalance.attachment": ["attach"],
    "moebalance.core.handle": ["Balancing"],
    "moebalance.core.state": ["plain_state_dict"],
    "moebalance.gates": ["GroupLimit", "Sigmoid", "Softmax", "SqrtSoftplus"],
    "moebalance.methods": [
        "EmaSwitchLoss",
        "GlobalBatchLoss",
        "LossFree",
        "MaxVio",
        "Method",
        "NoBalancing",
        "SMEBU",
        "PhiBalancing",
        "PlugInLoss",
        "QuantileBalancing",
        "Scheduled",
        "SequenceLoss",
        "Sinkhorn",
        "SwitchLoss",
        "Targeted",
        "Together",
        "ZLoss",
        "recommended",
    ],
    "moebalance.monitoring": ["Monitor", "monitor"],
    "moebalance.per_class": ["PerClassRouter"],
    "moebalance.potentials": ["Euclidean", "NegativeEntropy"],
    "moebalance.router": ["BalancedRouter", "CountAndCharge"],
}
_ORIGIN = {name: module for module, names in _HOME.items() for name in names}
_SUBMODULES = {
    "gates": "moebalance.gates",
    "methods": "moebalance.methods",
    "metrics": "moebalance.metrics",
    "potentials": "moebalance.potentials",
    "routing": "moebalance.routing",
    "huggingface": "moebalance.integrations.huggingface",
}

__all__ = ["__version__", *_ORIGIN]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(_SUBMODULES[name])
    if name in _ORIGIN:
        return globals().setdefault(name, getattr(import_module(_ORIGIN[name]), name))
    raise AttributeError(f"module 'moebalance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
