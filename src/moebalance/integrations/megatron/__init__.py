"""Megatron-Core: balanced routers through the model's spec, stepped by its training schedule.

    spec = balanced_spec(get_gpt_decoder_block_spec(config, ...), PhiBalancing(...))
    model = GPTModel(config, spec, ...)
    balancing = attach(model)

Written for megatron-core 0.16 to 0.19; no line of it is replaced or patched. Another release is
refused when this package is imported.
"""

from moebalance.integrations.megatron.release import check_release

check_release()  # before the imports below, which another release may not have

# ruff: noqa: E402
from moebalance.integrations.megatron.handle import attach
from moebalance.integrations.megatron.router import BalancedTopKRouter
from moebalance.integrations.megatron.spec import balanced_spec

__all__ = ["BalancedTopKRouter", "attach", "balanced_spec"]
