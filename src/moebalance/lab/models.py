"""Models from configurations and from folders, or a refusal that says what does not fit."""

import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moebalance.integrations.huggingface.scan import open_weights
from moebalance.words.suggest import did_you_mean


@contextmanager
def refusing(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever Transformers raises into a ValueError: `what`, the cause, and the advice."""
    try:
        yield
    except Exception as error:  # a model's own code may raise anything on odd values
        raise ValueError(f"{what}: {_cause(error)}.{advice}") from error


def _cause(error: Exception) -> str:
    """What an error says, on one line; with its kind if it says a word only, as a KeyError does."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


def read_configuration(path: Path) -> PreTrainedConfig:
    """Read a model's configuration; code that comes with it is never run.

    Raises:
        ValueError: Transformers does not know the kind of model, or cannot read it.
    """
    try:
        with refusing(f"Transformers cannot read {path}"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                str(path),
                local_files_only=True,
                trust_remote_code=False,  # else it may ask on stdin
            )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"Transformers cannot read {path}: its config.json names code of its own "
            "(auto_map), which moebalance never runs. Take a release of Transformers that "
            "knows this kind of model; or load the model in a program of your own, if you "
            "trust its code, and give it to moebalance.attach."
        ) from error
    return config


def load_model(folder: Path, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Load a causal language model, every weight of it from the folder.

    Args:
        folder: with *.safetensors.
        config: the model's configuration.
        **options: for `from_pretrained`.

    Raises:
        ValueError: a file is damaged, or a weight is missing or of another shape.
    """
    kind = config.model_type
    open_weights(folder)
    advice = " Mend its config.json, or the keys of [model]."
    with refusing(f"{folder} cannot be loaded as a {kind} model", advice):
        model, found = cast(
            tuple[PreTrainedModel, dict[str, Any]],
            AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # reported here, in words
                output_loading_info=True,
                **options,
            ),
        )
    for problem in ("missing_keys", "mismatched_keys"):
        if found.get(problem):
            names = sorted(key if isinstance(key, str) else str(key[0]) for key in found[problem])
            raise ValueError(
                f"{folder} does not fit a {kind} model: {problem.replace('_', ' ')} "
                f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}. They would start from "
                "random numbers; give a whole checkpoint of this architecture."
            )
    return model


def check_keys(keys: Iterable[str], config: PreTrainedConfig, architecture: str) -> None:
    """Refuse keys that neither an architecture's configuration nor its code knows.

    Raises:
        ValueError: with the nearest valid name.
    """
    fields = getattr(type(config), "__dataclass_fields__", {})
    known = {*config.to_dict(), *config.attribute_map, *fields, *_read_by_code(config)}
    for key in keys:
        if key not in known:
            raise ValueError(
                f"[model] {architecture} has no configuration key {key!r}."
                f"{did_you_mean(key, sorted(known))}"
            )


def _read_by_code(config: PreTrainedConfig) -> set[str]:
    """Keys that a model's code reads though its configuration has no such field, as `head_dim`."""
    model = cast(type, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    source = inspect.getsource(inspect.getmodule(model) or model)
    return set(re.findall(r'getattr\((?:self\.)?config, "(\w+)"', source))
