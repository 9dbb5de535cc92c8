"""From what a user names to a model without weights, made on the meta device."""

import difflib
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moebalance.integrations.huggingface.scan import read_table
from moebalance.lab.models import read_configuration, refusing

_HEADS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_MAPPING,
)
"""Where to look for a model's class, first the forms that are trained."""


def configuration(target: str | Path) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """The model's configuration, and the adapter's if the target is an adapter."""
    path = Path(target)
    if path.is_dir() and (path / "adapter_config.json").is_file():
        adapter = read_table(path / "adapter_config.json")
        base = Path(str(adapter.get("base_model_name_or_path")))
        if not (path / "config.json").is_file() and not (base / "config.json").is_file():
            raise ValueError(
                f"{path} is an adapter of {base}, which is not a folder here: download the base "
                "model's config.json and put it beside adapter_config.json."
            )
        return read_configuration(path if (path / "config.json").is_file() else base), adapter
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{path} {_content(path)}, so neither a model nor runs: give a folder with a "
                "config.json or adapter_config.json, as save_pretrained or a Trainer write it, or "
                "one with run logs (log.jsonl)."
            )
        return read_configuration(path), None
    if path.suffix == ".toml" and path.is_file():
        raise ValueError(
            f"{path} is a recipe. The doctor looks at models and at runs: give it the folder of "
            f"the runs, after `moebalance train {path}`; or the recipe's [model] checkpoint, or "
            "its model type."
        )
    if path.is_file() and path.suffix != ".json":
        raise ValueError(
            f"{path} is neither a config.json, nor a run log (log.jsonl), nor a trace: give one of "
            "them, a folder of them, or a model type such as qwen3_moe."
        )
    if path.is_file():
        return read_configuration(path), None
    kind = str(target)
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"{kind!r} is no model type, file or folder.{hint} Give a model type such as "
            "qwen3_moe, a config.json, a checkpoint folder, or a folder of runs; of a model on a "
            "hub, download its config.json first."
        )
    return AutoConfig.for_model(kind), None


def _content(path: Path) -> str:
    return "is an empty folder" if next(path.iterdir(), None) is None else "has no config.json"


def build(target: str | Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Make the model's modules without any memory for weights."""
    kind = _model_class(target, config)
    if kind is None:
        raise ValueError(f"Transformers has no model for {target} ({config.model_type}).")
    named = (
        " A model type stands for its default configuration, which some families do not have: give "
        "a config.json."
    )
    advice = "" if Path(target).exists() else named
    with (
        refusing(f"Transformers cannot build {kind.__name__} from {target}", advice),
        torch.device("meta"),
    ):
        # In bfloat16, so that a bias that is float32 all the same can be told.
        model: PreTrainedModel = kind._from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16
        )
    return model


def _model_class(target: str | Path, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that the configuration names, or else the first form that is trained.

    Raises:
        ValueError: the configuration names no classes but something else.
    """
    classes: Any = config.architectures or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(
            f"{target} has architectures={classes!r}: it must be a list of names, such as "
            '["Qwen3MoeForCausalLM"].'
        )
    forms: list[Any] = [mapping[type(config)] for mapping in _HEADS if type(config) in mapping]
    forms = [one for form in forms for one in (form if isinstance(form, tuple) else (form,))]
    for name in classes:
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    # A multimodal configuration may be listed under the model of its text part, too.
    fitting = [form for form in forms if isinstance(config, form.config_class or type(config))]
    return next(iter(fitting or forms), None)
