"""The balancing methods, one file each. `base.py` has their interface."""

from moebalance.methods.base import Method, Traits, charge, inner_methods, observe
from moebalance.methods.default import recommended
from moebalance.methods.ema_switch import EmaSwitchLoss
from moebalance.methods.global_batch import GlobalBatchLoss
from moebalance.methods.goals import EntropyDeficit, Gini, Goal, MaxVio, RankVio
from moebalance.methods.loss_free import LossFree
from moebalance.methods.none import NoBalancing
from moebalance.methods.orthogonality import orthogonality
from moebalance.methods.phi import PhiBalancing
from moebalance.methods.plug_in import PlugInLoss
from moebalance.methods.quantile import QuantileBalancing
from moebalance.methods.scheduled import Scheduled
from moebalance.methods.sequence import SequenceLoss
from moebalance.methods.sinkhorn import Sinkhorn
from moebalance.methods.smebu import SMEBU
from moebalance.methods.switch import SwitchLoss
from moebalance.methods.targeted import Targeted
from moebalance.methods.together import Together
from moebalance.methods.z_loss import ZLoss

__all__ = [
    "SMEBU",
    "EmaSwitchLoss",
    "EntropyDeficit",
    "Gini",
    "GlobalBatchLoss",
    "Goal",
    "LossFree",
    "MaxVio",
    "Method",
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
    "Traits",
    "ZLoss",
    "charge",
    "inner_methods",
    "observe",
    "orthogonality",
    "recommended",
]
