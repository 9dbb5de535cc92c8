"""Transformers: find the routers of a model, tie balancing to them, and follow its Trainer.

Routers are left as they are. A forward hook on each one puts the injecting node on its weights and,
where the family has no selection bias of its own, chooses again under the price. Where it has one
(`e_score_correction_bias` and its kin), −price is written there and leaves with `save_pretrained`.
Hooks on the model hand over the padding mask and follow the gradient of its loss.
"""

# First: it names an old release, before an import fails for what that does not have.
import moebalance.integrations.huggingface.release  # noqa: F401

# isort: split

from moebalance.integrations.huggingface.exporting import check_export, export
from moebalance.integrations.huggingface.hooks import attach, serves
from moebalance.integrations.huggingface.monitor_callback import MonitorCallback
from moebalance.integrations.huggingface.routers import Site, find_sites
from moebalance.integrations.huggingface.state_file import STATE_FILE, load, save
from moebalance.integrations.huggingface.trainer import BalanceCallback

__all__ = [
    "STATE_FILE",
    "BalanceCallback",
    "MonitorCallback",
    "Site",
    "attach",
    "check_export",
    "export",
    "find_sites",
    "load",
    "save",
    "serves",
]
