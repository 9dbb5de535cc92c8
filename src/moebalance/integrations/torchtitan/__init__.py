"""torchtitan: balance its MoE models without a fork.

    # my_package/config_registry.py
    from moebalance import PhiBalancing
    from moebalance.integrations.torchtitan import balanced
    from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_16b

    def deepseek_v3_16b_phi():
        return balanced(deepseek_v3_16b(), PhiBalancing(strength=0.01))

and then torchtitan's own `--module my_package --config deepseek_v3_16b_phi`. The guide is
docs/torchtitan.md. Written for torchtitan 0.3.0; another one is refused when this package is
imported.
"""

from moebalance.integrations.torchtitan.release import check_release

check_release()  # before the imports below, which another release may not have

# ruff: noqa: E402
from moebalance.integrations.torchtitan.recipe import BalanceMetrics as BalanceMetrics
from moebalance.integrations.torchtitan.recipe import balanced as balanced
from moebalance.integrations.torchtitan.router import BalancedTopKRouter as BalancedTopKRouter
from moebalance.integrations.torchtitan.steps import drive as drive
