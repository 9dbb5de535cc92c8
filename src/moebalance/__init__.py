"""moebalance: load balancing for Mixture-of-Experts training.

φ-balancing (Chen et al., ICML 2026, arXiv 2605.15403) and its rivals behind one interface.
Names are imported on first use: the report and the command line start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebalance.attachment import attach as attach
    from moebalance.core.handle import Balancing as Balancing
    from moebalance.gates import Gate as Gate
    from moebalance.gates import GroupLimit as GroupLimit
    from moebalance.gates import Sigmoid as Sigmoid
    from moebalance.gates import Softmax as Softmax
    from moebalance.integrations import huggingface as huggingface
    from moebalance.methods import EmaSwitchLoss as EmaSwitchLoss
    from moebalance.methods import EntropyDeficit as EntropyDeficit
    from moebalance.methods import Gini as Gini
    from moebalance.methods import GlobalBatchLoss as GlobalBatchLoss
    from moebalance.methods import Goal as Goal
    from moebalance.methods import LossFree as LossFree
    from moebalance.methods import MaxVio as MaxVio
    from moebalance.methods import Method as Method
    from moebalance.methods import NoBalancing as NoBalancing
    from moebalance.methods import PhiBalancing as PhiBalancing
    from moebalance.methods import PlugInLoss as PlugInLoss
    from moebalance.methods import QuantileBalancing as QuantileBalancing
    from moebalance.methods import RankVio as RankVio
    from moebalance.methods import Scheduled as Scheduled
    from moebalance.methods import SequenceLoss as SequenceLoss
    from moebalance.methods import Sinkhorn as Sinkhorn
    from moebalance.methods import SwitchLoss as SwitchLoss
    from moebalance.methods import Targeted as Targeted
    from moebalance.methods import Together as Together
    from moebalance.methods import ZLoss as ZLoss
    from moebalance.methods import charge as charge
    from moebalance.monitoring import Monitor as Monitor
    from moebalance.monitoring import monitor as monitor
    from moebalance.potentials import Combined as Combined
    from moebalance.potentials import Euclidean as Euclidean
    from moebalance.potentials import Grouped as Grouped
    from moebalance.potentials import LogCosh as LogCosh
    from moebalance.potentials import LpNorm as LpNorm
    from moebalance.potentials import NegativeEntropy as NegativeEntropy
    from moebalance.potentials import Potential as Potential
    from moebalance.potentials import PseudoHuber as PseudoHuber
    from moebalance.potentials import Relative as Relative
    from moebalance.potentials import Renyi as Renyi
    from moebalance.potentials import SoftL1 as SoftL1
    from moebalance.potentials import Softplus as Softplus
    from moebalance.potentials import Tsallis as Tsallis
    from moebalance.potentials import UnitSlope as UnitSlope
    from moebalance.router import BalancedRouter as BalancedRouter
    from moebalance.routing import Batch as Batch
    from moebalance.routing import Routing as Routing
    from moebalance.routing import Sums as Sums
    from moebalance.routing import measure as measure
    from moebalance.routing import route as route

__version__ = "0.1.0"

_HOME = {
    "moebalance.attachment": ["attach"],
    "moebalance.methods": [
        "Method",
        "EmaSwitchLoss",
        "EntropyDeficit",
        "Gini",
        "GlobalBatchLoss",
        "Goal",
        "LossFree",
        "MaxVio",
        "NoBalancing",
        "PhiBalancing",
        "PlugInLoss",
        "QuantileBalancing",
        "RankVio",
        "Scheduled",
        "SequenceLoss",
        "Sinkhorn",
        "SwitchLoss",
        "Targeted",
        "Together",
        "ZLoss",
        "charge",
    ],
    "moebalance.core.handle": ["Balancing"],
    "moebalance.router": ["BalancedRouter"],
    "moebalance.monitoring": ["Monitor", "monitor"],
    "moebalance.potentials": [
        "Combined",
        "Euclidean",
        "Grouped",
        "LogCosh",
        "LpNorm",
        "NegativeEntropy",
        "Potential",
        "PseudoHuber",
        "Relative",
        "Renyi",
        "SoftL1",
        "Softplus",
        "Tsallis",
        "UnitSlope",
    ],
    "moebalance.gates": ["Gate", "GroupLimit", "Sigmoid", "Softmax"],
    "moebalance.routing": ["Batch", "Routing", "Sums", "measure", "route"],
}
_ORIGIN = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_ORIGIN]


def __getattr__(name: str) -> Any:
    if name == "huggingface":
        return import_module("moebalance.integrations.huggingface")
    if name in _ORIGIN:
        return globals().setdefault(name, getattr(import_module(_ORIGIN[name]), name))
    raise AttributeError(f"module 'moebalance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "huggingface"])
