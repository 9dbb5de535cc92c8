"""Metrics of the load: how even it is, how experts specialise, and the cost of imbalance.

load.py             how even a load is; the gap between soft and hard load
specialisation.py   which expert serves which domain; how choices change and go together
image.py            a load as a small picture
shown.py            what trackers show of a load: percentiles over layers, the extreme experts
summary.py          a model's layers in about ten numbers
expert_parallel.py  the cost of imbalance when experts are spread over ranks; imports no torch

Names are imported on first use, so that the report reads `expert_parallel` without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebalance.metrics.image import load_image as load_image
    from moebalance.metrics.image import png as png
    from moebalance.metrics.load import coefficient_of_variation as coefficient_of_variation
    from moebalance.metrics.load import dead_fraction as dead_fraction
    from moebalance.metrics.load import gini as gini
    from moebalance.metrics.load import max_violation as max_violation
    from moebalance.metrics.load import min_violation as min_violation
    from moebalance.metrics.load import normalized_entropy as normalized_entropy
    from moebalance.metrics.load import price_spread as price_spread
    from moebalance.metrics.load import sampling_floor as sampling_floor
    from moebalance.metrics.load import served_fraction as served_fraction
    from moebalance.metrics.load import soft_hard_gap as soft_hard_gap
    from moebalance.metrics.specialisation import churn as churn
    from moebalance.metrics.specialisation import coactivation as coactivation
    from moebalance.metrics.specialisation import expert_purity as expert_purity
    from moebalance.metrics.specialisation import mutual_information as mutual_information
    from moebalance.metrics.specialisation import purity as purity
    from moebalance.metrics.specialisation import router_similarity as router_similarity

_HOME = {
    "image": ["load_image", "png"],
    "load": [
        "coefficient_of_variation",
        "dead_fraction",
        "gini",
        "max_violation",
        "min_violation",
        "normalized_entropy",
        "price_spread",
        "sampling_floor",
        "served_fraction",
        "soft_hard_gap",
    ],
    "specialisation": [
        "churn",
        "coactivation",
        "expert_purity",
        "mutual_information",
        "purity",
        "router_similarity",
    ],
}
_ORIGIN = {name: module for module, names in _HOME.items() for name in names}

__all__ = list(_ORIGIN)


def __getattr__(name: str) -> Any:
    if name in _ORIGIN:
        return getattr(import_module(f"moebalance.metrics.{_ORIGIN[name]}"), name)
    raise AttributeError(f"module 'moebalance.metrics' has no attribute {name!r}")
