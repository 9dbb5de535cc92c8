"""axolotl: a plugin that balances the model being trained.

    plugins:
      - moebalance.integrations.axolotl.MoebalancePlugin
    moebalance:
      method: phi
      strength: 0.01

`method` is what `moebalance train --method` takes, `phi+loss-free` included; the other keys are the
options of its first part. Written against axolotl 0.19; imported by axolotl alone.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
from pydantic import BaseModel, ConfigDict, model_validator
from transformers import PreTrainedModel, TrainerCallback

from moebalance.integrations.huggingface import BalanceCallback
from moebalance.methods.base import Method
from moebalance.words.methods import build_method, without_options

_TRL = frozenset(["dpo", "gdpo", "grpo", "ipo", "kto"])
"""Values of `rl:` whose trainers are TRL's and switch the model's own balancing loss on."""


class Settings(BaseModel):
    """The `moebalance:` table: a method, and options of it."""

    model_config = ConfigDict(extra="allow")

    method: str

    @model_validator(mode="after")
    def _known(self) -> "Settings":
        self.build()
        return self

    def build(self) -> Method:
        """Make the method.

        Raises:
            ValueError: an unknown method or option, with the nearest one that exists.
        """
        first = without_options(self.method).partition("+")[0]
        return build_method(self.method, {first: self.model_extra or {}})


class MoebalanceArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    moebalance: Settings


class MoebalancePlugin(BasePlugin):  # type: ignore[misc]
    """Attach a balancing method to the trainer's model, and let the trainer drive it."""

    def get_input_args(self) -> str:
        """Name the model of this plugin's settings, for axolotl to merge into its own."""
        return "moebalance.integrations.axolotl.MoebalanceArgs"

    def get_training_args(self, cfg: Any) -> dict[str, float]:
        """Switch off the balancing loss that TRL adds by default, which axolotl has no key for."""
        kind = getattr(cfg.get("rl"), "value", cfg.get("rl"))
        return {"router_aux_loss_coef": 0.0} if kind in _TRL else {}

    def add_callbacks_pre_trainer(self, cfg: Any, model: PreTrainedModel) -> list[TrainerCallback]:
        """Make the callback that attaches when the trainer is made."""
        method = Settings(**cfg["moebalance"]).build()
        return [BalanceCallback(method, resume_from=cfg.get("resume_from_checkpoint"))]
