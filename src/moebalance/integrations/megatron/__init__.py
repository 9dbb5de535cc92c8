"""Megatron-Core: balanced routers through the model's spec, stepped by its training schedule.

    spec = balanced_spec(get_gpt_decoder_block_spec(config, ...), PhiBalancing(...))
    model = GPTModel(config, spec, ...)
    balancing = attach(model)

Written against megatron-core 0.16.1; no line of it is replaced or patched.
"""

from moebalance.integrations.megatron.handle import attach
from moebalance.integrations.megatron.router import BalancedTopKRouter
from moebalance.integrations.megatron.spec import balanced_spec

__all__ = ["BalancedTopKRouter", "attach", "balanced_spec"]
