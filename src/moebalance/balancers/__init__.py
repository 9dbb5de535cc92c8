"""The methods, one file each, behind the one interface of `base.py`."""

from moebalance.balancers.base import Balancer, charge
from moebalance.balancers.ema_switch import EmaSwitchLoss
from moebalance.balancers.global_batch import GlobalBatchLoss
from moebalance.balancers.goals import EntropyDeficit, Gini, Goal, MaxVio, RankVio
from moebalance.balancers.loss_free import LossFree
from moebalance.balancers.none import NoBalancing
from moebalance.balancers.phi import PhiBalancing
from moebalance.balancers.plug_in import PlugInLoss
from moebalance.balancers.quantile import QuantileBalancing
from moebalance.balancers.scheduled import Scheduled
from moebalance.balancers.sequence import SequenceLoss
from moebalance.balancers.sinkhorn import Sinkhorn
from moebalance.balancers.switch import SwitchLoss
from moebalance.balancers.targeted import Targeted
from moebalance.balancers.together import Together
from moebalance.balancers.z_loss import ZLoss

__all__ = [
    "Balancer",
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
]
