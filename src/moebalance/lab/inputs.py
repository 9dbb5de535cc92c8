"""What a run is given: its texts, and a model with fresh weights."""

import logging
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moebalance.lab.checkpoints import checkpoint_folder
from moebalance.lab.models import check_keys, load_model, refusing
from moebalance.lab.recipe import Recipe
from moebalance.lab.text.checkpoint_tokenizer import has_other_tokenizer, load_checkpoint_tokenizer
from moebalance.lab.text.data import TextData, load_data
from moebalance.words.suggest import did_you_mean

logger = logging.getLogger(__name__)


class Texts(NamedTuple):
    """The text to train on, and in fine-tuning the text that the model knew already, if given."""

    data: TextData
    old: TextData | None


def load_texts(recipe: Recipe, *, cache_dir: Path | None = None) -> Texts:
    """Read a recipe's texts, both with one tokeniser.

    Raises:
        FileNotFoundError, ValueError: a text, or the checkpoint's tokeniser, cannot be read.
    """
    folder = None if recipe.checkpoint is None else checkpoint_folder(recipe.checkpoint)
    own = None
    if folder is not None and recipe.data.tokenizer == "checkpoint":
        own = load_checkpoint_tokenizer(folder)
    data = load_data(recipe.data, tokenizer=own, cache_dir=cache_dir)
    if folder is not None and own is None and has_other_tokenizer(folder, data.tokenizer):
        logger.warning(
            "[data] tokenizer=%r is used in place of the checkpoint's own in %s.",
            recipe.data.tokenizer,
            folder,
        )
    old = None
    if recipe.old_data is not None:
        old = load_data(recipe.old_data, tokenizer=data.tokenizer, cache_dir=cache_dir)
    return Texts(data, old)


def build_model(recipe: Recipe, vocab_size: int, checkpoint: Path | None = None) -> PreTrainedModel:
    """Make the recipe's model, with fresh weights or those of a checkpoint of this run.

    The weights are loaded here because a Trainer that resumes leaves out experts that Transformers
    saves under other names than the model has: it logs "missing keys" and goes on without them.

    Raises:
        ValueError: unknown architecture or configuration key, with the nearest valid name; values
            that make no model; or a checkpoint that does not fit.
    """
    keys = dict(recipe.model)
    architecture = str(keys.pop("architecture"))
    experts = keys.pop("experts_implementation", None)
    possible = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if architecture not in possible:
        raise ValueError(
            f"[model] architecture={architecture!r}.{did_you_mean(architecture, possible)} It must "
            "be a causal language model of the installed Transformers, such as qwen3_moe."
        )
    if "vocab_size" in keys:
        raise ValueError(
            f"[model] vocab_size={keys['vocab_size']!r}: the tokeniser sets it, here to "
            f'{vocab_size}. Leave it out; for another number, say [data] tokenizer = "bpe" and '
            "vocab_size there."
        )
    check_keys(keys, AutoConfig.for_model(architecture), architecture)
    with refusing(f"[model] Transformers cannot make a {architecture} model of these keys"):
        config = AutoConfig.for_model(architecture, vocab_size=vocab_size, **keys)
        if checkpoint is None:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=False
            )
    if checkpoint is not None:
        model = load_model(checkpoint, config)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model
