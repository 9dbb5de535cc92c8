"""A model's own balancing loss, which would be added to ours."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger("moebalance")


def silence_native_loss(model: PreTrainedModel) -> Callable[[], None]:
    """Switch off a model's own balancing loss, which would be added to ours; return the undo."""
    silenced = []
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False
            silenced.append(config)
            logger.warning(
                "moebalance: switched off %s's own balancing loss (output_router_logits=True, "
                "router_aux_loss_coef=%s); detach() switches it on again.",
                type(model).__name__,
                getattr(config, "router_aux_loss_coef", None),
            )
    return partial(_restore, silenced)


def adds_native_loss(model: nn.Module) -> bool:
    """Whether `model` adds a balancing loss when it is asked for router logits and given labels.

    Some families read the coefficient from the model, some from its configuration.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    found = [getattr(holder, "router_aux_loss_coef", None) for holder in (model, text)]
    known = [coefficient for coefficient in found if coefficient is not None]
    return any(known) or not known


def _restore(configs: list[Any]) -> None:
    for config in configs:
        config.output_router_logits = True
