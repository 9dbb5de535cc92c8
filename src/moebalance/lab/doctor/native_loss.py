"""A family's own balancing loss, and which trainers switch it on.

Transformers computes it in the model's forward where `config.output_router_logits` is set, and only
in families whose modeling file has a loss function; elsewhere the switch is accepted and ignored.
What each trainer does with the switch was read from its source, in the version named.
"""

import inspect
import sys
from dataclasses import dataclass

from transformers import PreTrainedModel

_ALLOWED = frozenset(
    [
        "dbrx",
        "ernie4_5_moe",
        "granitemoe",
        "jamba",
        "jetmoe",
        "llama4",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
    ]
)
"""Model types for which LLaMA-Factory passes `moe_aux_loss_coef` on."""

_ALLOWED_TEXT = frozenset(["glm4v_moe_text", "qwen3_moe"])
"""The same, for the text part of a multimodal model."""


@dataclass(frozen=True)
class NativeLoss:
    """What a model's configuration and code say about a balancing loss of its own.

    Attributes:
        switch: `output_router_logits`; None if the configuration has no such switch.
        coefficient: of the loss; None if the configuration has none.
        coefficient_name: what it is called there.
        computed: whether the model's forward computes such a loss at all.
    """

    switch: bool | None
    coefficient: float | None
    coefficient_name: str
    computed: bool

    @property
    def ignored(self) -> bool:
        """Whether the switch is on and nothing comes of it."""
        return bool(self.switch) and not self.computed


@dataclass(frozen=True)
class TrainerUse:
    """What one trainer does with a family's own loss.

    Attributes:
        trainer: name and version.
        active: whether the loss is added if nothing is set.
        why: in plain words.
    """

    trainer: str
    active: bool
    why: str


def native_loss(model: PreTrainedModel) -> NativeLoss:
    """Read a model's configuration and forward for a balancing loss of its own."""
    text = model.config.get_text_config()
    switch = getattr(
        text, "output_router_logits", getattr(model.config, "output_router_logits", None)
    )
    name = next((n for n in ("router_aux_loss_coef", "aux_loss_coef") if hasattr(text, n)), "")
    coefficient = getattr(text, name) if name else None
    experts = getattr(text, "ffn_config", None)  # DBRX keeps it there
    if not name and experts is not None:
        name, coefficient = "ffn_config.moe_loss_weight", experts.moe_loss_weight
    kind = type(model)
    # A file may have the function for one of its models only, or hand on an aux_loss of None.
    has_function = hasattr(sys.modules[kind.__module__], "load_balancing_loss_func")
    computed = has_function and "aux_loss" in inspect.getsource(kind.forward)
    return NativeLoss(switch, coefficient, name, computed)


def trainer_uses(model: PreTrainedModel) -> tuple[TrainerUse, ...]:
    """What each trainer does with this model's own balancing loss if nothing is set."""
    loss = native_loss(model)
    return (
        TrainerUse("Trainer", *_as_configured(loss)),
        TrainerUse("TRL 1.16", *_trl(loss)),
        TrainerUse("axolotl 0.19", *_axolotl(loss)),
        TrainerUse("ms-swift 4.6", *_swift(loss)),
        TrainerUse("LLaMA-Factory 0.9.5", *_llama_factory(model, loss)),
    )


def _as_configured(loss: NativeLoss) -> tuple[bool, str]:
    if not loss.computed:
        ignored = "output_router_logits is on and ignored: " if loss.switch else ""
        return False, f"{ignored}this family computes no such loss"
    if loss.switch is None:
        return False, "the configuration has no output_router_logits"
    if not loss.switch:
        return False, "output_router_logits is off"
    if not loss.coefficient:
        return False, f"output_router_logits is on, but {loss.coefficient_name} is 0"
    return True, f"output_router_logits is on, {loss.coefficient_name} = {loss.coefficient:g}"


def _trl(loss: NativeLoss) -> tuple[bool, str]:
    """SFT, DPO, KTO, GRPO and RLOO: on where the configuration has switch and coefficient."""
    if loss.coefficient_name != "router_aux_loss_coef" or loss.switch is None:
        return _as_configured(loss)
    if not loss.coefficient:
        return False, "router_aux_loss_coef is 0"
    if not loss.computed:
        return False, "asked for by default, but this family computes no such loss"
    return True, (
        f"switched on by default, router_aux_loss_coef = {loss.coefficient:g}; "
        "router_aux_loss_coef=0.0 in the trainer's arguments switches it off"
    )


def _axolotl(loss: NativeLoss) -> tuple[bool, str]:
    active, why = _as_configured(loss)
    settable = loss.computed and loss.switch is not None
    # The trainers behind `rl:` are those of TRL 1.9, with a default of their own.
    more = "; overrides_of_model_config can set it, and rl: switches it on" if settable else ""
    return active, why + more


def _swift(loss: NativeLoss) -> tuple[bool, str]:
    """Sets `router_aux_loss_coef` in the configuration to its own argument, 0 by default."""
    if loss.coefficient_name != "router_aux_loss_coef" or not loss.computed:
        return _as_configured(loss)
    return False, "unless --router_aux_loss_coef is given"


def _llama_factory(model: PreTrainedModel, loss: NativeLoss) -> tuple[bool, str]:
    """Passes its own coefficient on for the families that it lists; otherwise as configured."""
    active, why = _as_configured(loss)
    kind, text = model.config.model_type, model.config.get_text_config().model_type
    listed = kind in _ALLOWED or (text != kind and text in _ALLOWED_TEXT)
    if active:
        return True, why
    if not loss.computed:
        return False, f"{why}; moe_aux_loss_coef would be ignored"
    if not listed:
        return False, "moe_aux_loss_coef would be ignored: this family is not on its list"
    return False, "unless moe_aux_loss_coef is given"
