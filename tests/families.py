"""Tiny random models of every MoE family of Transformers, for the tests to attach to."""

import inspect
import warnings
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from family_configs import (
    COMMON_FAMILIES,
    NEWER_FAMILIES,
    OTHER_FAMILIES,
    SHARED,
    VOCABULARY,
    Settings,
)
from family_towers import MULTIMODAL_FAMILIES

FAMILIES: dict[str, Settings] = {
    **COMMON_FAMILIES,
    **OTHER_FAMILIES,
    **MULTIMODAL_FAMILIES,
    **{family: each for family, each in NEWER_FAMILIES.items() if family in CONFIG_MAPPING},
}
"""Settings of every family, by the model type that one passes to `tiny`."""

COMMON: tuple[str, ...] = tuple(COMMON_FAMILIES)
"""The families that most people train; the tests of every promise run on these."""

# What builds a family, where it is not AutoModelForCausalLM: an automatic class, or the family's
# own one where no automatic class leads to it.
_BUILDERS = {
    "deepseek_ocr2_text": "DeepseekOcr2TextModel",
    "diffusion_gemma_text": "DiffusionGemmaEncoderTextModel",
    "ernie4_5_vl_moe_text": "Ernie4_5_VLMoeTextModel",
    "gemma4": "AutoModelForImageTextToText",
    "glm4v_moe_text": "AutoModel",
    "glm5_next_text": "AutoModel",
    "hy_v4_vl_text": "AutoModel",
    "llama4": "AutoModelForImageTextToText",
    "mistral4": "AutoModelForImageTextToText",
    "mistral_large4_text": "AutoModel",
    "muse_spark_text": "AutoModel",
    "nllb-moe": "AutoModelForSeq2SeqLM",
    "openai_privacy_filter": "AutoModelForTokenClassification",
    "qwen3_5_moe": "AutoModelForImageTextToText",
    "qwen3_omni_moe_talker_text": "Qwen3OmniMoeTalkerModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe": "AutoModelForImageTextToText",
    "qwen3_vl_moe_text": "AutoModel",
    "step3p5": "Step3p7TextModel",
    "switch_transformers": "AutoModelForSeq2SeqLM",
    "unlimited_ocr_text": "UnlimitedOcrTextModel",
}

# Weights that a family starts at zero, where all experts tie, or leaves unset: endings of names.
_UNSET = {
    "afmoe": ("router.gate.weight",),
    "qwen3_omni_moe_talker_text": ("mlp.gate.weight", "gate_up_proj", "experts.down_proj"),
}


@dataclass(frozen=True)
class Expected:
    """What a tiny model holds, counted by hand in the family's modeling file.

    Args:
        routers: MoE routers in the model.
        idle: those of them that text alone never reaches.
        num_experts: experts that a router chooses from and that compute something.
        empty: further choices that compute nothing; the logits have a column for each.
        top_k: experts of each token.
    """

    routers: int = 2
    idle: int = 0
    num_experts: int = 8
    empty: int = 0
    top_k: int = 2

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Where some choices compute nothing, half as much load for each of them."""
        return (2.0,) * self.num_experts + (1.0,) * self.empty if self.empty else None


EXPECTED: dict[str, Expected] = {family: Expected() for family in FAMILIES} | {
    "deepseek_v4": Expected(routers=3),  # a hash router and two learned ones
    "doge": Expected(num_experts=16),
    "ernie4_5_vl_moe_text": Expected(routers=4, idle=2),  # one for text, one for images a layer
    "jetmoe": Expected(routers=4),  # each layer also chooses among attention experts
    "llama4": Expected(top_k=1),
    "llama4_text": Expected(top_k=1),
    "longcat_flash": Expected(empty=2),
    "switch_transformers": Expected(top_k=1),
    "zaya": Expected(empty=1, top_k=1),
}


def tiny(family: str, **changes: object) -> PreTrainedModel:
    """A model with the same random weights at every call, in training mode, without dropout.

    Args:
        family: one of `FAMILIES`.
        changes: settings of the configuration, or of its text part where it has one.
    """
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the families' own advice on their own settings
        model = _build(family, _config(family, changes)).train()
    for name, weight in model.named_parameters():
        if name.endswith(_UNSET.get(family, ())):
            nn.init.normal_(weight, std=0.02)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            # A checkpoint brings the table of a hash router; without one all tokens go to expert 0.
            first = torch.arange(len(table)) % 8
            table.copy_(torch.stack([first, (first + 3) % 8], dim=-1))
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """Token ids (batch, length) without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def loss(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    """The model's own task loss on token ids; without one, a fixed one of its last hidden states.

    Args:
        model: a tiny model, bare or wrapped.
        ids: (batch, length); the input, and what the model learns unless `labels` is given.
        kwargs: handed on to the model.
    """
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    if hasattr(inner, "codec_embedding"):
        # Given ids, the talker looks for its embeddings in a module that it does not have.
        kwargs["inputs_embeds"] = inner.get_input_embeddings()(ids)
    else:
        kwargs["input_ids"] = ids
    if "labels" in inspect.signature(inner.forward).parameters:
        classifies = type(inner).__name__.endswith("ForTokenClassification")
        kwargs.setdefault("labels", ids % inner.config.num_labels if classifies else ids)
        return model(**kwargs).loss
    hidden = model(**kwargs).last_hidden_state
    generator = torch.Generator().manual_seed(2)
    projection = torch.randn(hidden.shape[-1], VOCABULARY, generator=generator)
    return (hidden @ projection).square().mean()


def _config(family: str, changes: Settings) -> PreTrainedConfig:
    settings = FAMILIES[family]
    if isinstance(text := settings.get("text_config"), dict):
        settings = {**settings, "text_config": {**SHARED, **text, **changes}}
    else:
        settings = {**SHARED, **settings, **changes}
    return AutoConfig.for_model(family, **settings)


def _build(family: str, config: PreTrainedConfig) -> PreTrainedModel:
    name = _BUILDERS.get(family, "AutoModelForCausalLM")
    if name.startswith("Auto"):
        return getattr(import_module("transformers"), name).from_config(config)
    modeling = import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    return getattr(modeling, name)._from_config(config)
