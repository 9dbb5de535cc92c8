"""Fine-tuning: a model from the folder of a checkpoint, whole or with LoRA, and its own folder.

`train` runs it; its model comes from here. Every weight starts as the checkpoint has it. The seed
fixes the data order, and the first factors of LoRA.
"""

import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moebalance import Balancing, attach
from moebalance.core.state import method_name
from moebalance.files import writing
from moebalance.integrations.huggingface import STATE_FILE, check_export, find_sites, save
from moebalance.integrations.huggingface.state_file import read
from moebalance.lab.checkpoints import checkpoint_folder
from moebalance.lab.models import check_keys, load_model, read_configuration, refusing
from moebalance.lab.recipe import FINAL, LoraSpec, Recipe
from moebalance.lab.text.tokens import Tokenizer
from moebalance.methods import Method
from moebalance.words.methods import method_classes

logger = logging.getLogger(__name__)


def start(
    recipe: Recipe, method: Method, vocab_size: int, resumed: Path | None = None
) -> tuple[PreTrainedModel, Balancing]:
    """Load the model of a fine-tuning recipe, adapt it if the recipe says so, and balance it.

    If the folder holds a balancing state of the same method, that state goes on: a price or an
    average belongs to its weights.

    Args:
        recipe: a recipe with `[model] checkpoint`.
        method: the method.
        vocab_size: ids of the tokeniser; the model needs at least as many embeddings.
        resumed: a checkpoint of this run to take the weights from.

    Raises:
        ValueError: no such key, no causal language model, weights or a balancing state that do not
            fit, no MoE router, or a lever that is not there.
    """
    folder = checkpoint_folder(str(recipe.checkpoint))
    # An adapter's checkpoint has no weights of the model; the Trainer reads the adapter itself.
    weights = folder if resumed is None or recipe.lora is not None else resumed
    model = _load(recipe, folder, weights)
    _check_texts(recipe, model, vocab_size)
    state = _earlier_state(model, method, folder) if resumed is None else None
    if recipe.lora is not None:
        model = _adapt(model, recipe.lora)
    balancing = attach(model, method)
    if state is not None:
        balancing.load_state_dict({**state, "steps": 0})
    return model, balancing


def save_final(
    model: PreTrainedModel,
    balancing: Balancing,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    writes: bool = True,
) -> Path:
    """Detach and save the model that a run ends with, whole or not at all.

    The folder holds the model (or the adapter), the tokeniser and the balancing state. A selection
    price that the model can hold is in its weights.

    Args:
        model: the model; a sharded one is gathered, so that all ranks must call this.
        balancing: the handle on its layers.
        tokenizer: its tokeniser, saved into the same folder.
        folder: folder of the run.
        writes: False on a rank that only hands over its part.

    Returns:
        The folder `final` in `folder`.
    """
    final, partial = folder / FINAL, folder / f"{FINAL}.partial"
    if not writes:
        balancing.detach(keep_price=not balancing.price_outside)
        with TemporaryDirectory() as aside:
            model.save_pretrained(aside, is_main_process=False)
        return final
    with writing(final):
        _write_final(model, balancing, tokenizer, partial)
    shutil.rmtree(final, ignore_errors=True)
    return partial.rename(final)


def _write_final(
    model: PreTrainedModel, balancing: Balancing, tokenizer: Tokenizer, partial: Path
) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    save(balancing, partial)
    try:
        check_export(model, balancing)
    except ValueError as error:  # said, not refused: with its state the folder is whole
        logger.warning("%s: %s", partial.with_name(FINAL), error)
    balancing.detach(keep_price=not balancing.price_outside)
    model.save_pretrained(partial)
    tokenizer.save_beside(partial)


def _load(recipe: Recipe, folder: Path, weights: Path) -> PreTrainedModel:
    keys = {key: value for key, value in recipe.model.items() if key != "checkpoint"}
    experts = keys.pop("experts_implementation", None)
    # Updates of 2e-5 vanish in a bfloat16 weight: train in float32 whatever the file holds.
    dtype = keys.pop("dtype", "float32")
    config = read_configuration(folder)
    kind = config.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{folder} holds a {kind} model, which is no causal language model of the installed "
            "Transformers: give the text model, or fine-tune it in a loop of your own with "
            "moebalance.attach."
        )
    check_keys(keys, config, kind)
    with refusing(f"[model] These keys do not go with the config.json in {folder}"):
        for key, value in keys.items():
            setattr(config, key, value)
    model = load_model(weights, config, dtype=dtype)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model


def _check_texts(recipe: Recipe, model: PreTrainedModel, vocab_size: int) -> None:
    known = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if vocab_size > known:
        raise ValueError(
            f"The tokeniser has {vocab_size} ids and the checkpoint {known} embeddings: they do "
            'not belong together. Use the checkpoint\'s own, [data] tokenizer = "checkpoint".'
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and recipe.data.seq_len > longest:
        raise ValueError(
            f"[data] seq_len={recipe.data.seq_len}: the checkpoint was made for at most {longest} "
            "tokens (max_position_embeddings). Give a shorter one."
        )


def _earlier_state(model: PreTrainedModel, method: Method, folder: Path) -> dict[str, Any] | None:
    """The balancing state that a run of this method left with the weights; None for none.

    Raises:
        ValueError: there is one of this method, or a damaged one, and it cannot be gone on from.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    state = read(folder)
    saved = state.get("method")
    if isinstance(saved, str) and saved != method_name(method):
        level = logging.WARNING if _prices_selection(saved) else logging.INFO
        text = "%s is left aside; this run starts anew. It belongs to %s, and this run has %s."
        logger.log(level, text, path, saved, method_name(method))
        return None
    with attach(model, method) as balancing:
        try:
            balancing.load_state_dict(state)
        except ValueError as error:
            raise ValueError(
                f"{path} belongs to the weights and cannot be used: {error} Copy it again, or "
                "remove it to start without a state."
            ) from error
        return balancing.state_dict()


def _prices_selection(method: str) -> bool:
    """Whether a method of this name chose experts under a price, which the weights are used to."""
    kinds = method_classes().values()
    return any(kind().traits.has_selection_price for kind in kinds if kind.__name__ in method)


def _adapt(model: PreTrainedModel, spec: LoraSpec) -> PreTrainedModel:
    """Put LoRA on a model.

    Routers are trained whole, through `modules_to_save`: a low-rank update of a router
    (`target_parameters`) hides the router's own selection bias from the block that reads it, in
    every family that has one, and leaves a trained bias out of the adapter's file.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ValueError("[lora] needs PEFT: pip install peft") from error
    targets = spec.target_modules
    names = _attention_layers(model) if isinstance(targets, str) else list(targets)
    routers = [site.name for site in find_sites(model)]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.r,
        lora_alpha=cast(int, spec.alpha),
        lora_dropout=spec.dropout,
        target_modules=names,
        modules_to_save=routers if spec.train_router else None,
    )
    try:
        return cast(PreTrainedModel, get_peft_model(model, config))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"[lora] target_modules={targets!r} does not fit this model: {error} Name linear "
            "layers; the routers are not among them, train_router trains them whole."
        ) from error


def _attention_layers(model: PreTrainedModel) -> list[str]:
    """The linear layers of attention, but for a gate on its output.

    PEFT takes `gate_proj`, wherever it stands, for a part of the experts. Subclasses of Linear,
    such as one that multiplies group by group, are not what LoRA computes.
    """
    found = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and "gate" not in name.rpartition(".")[2]
        and any("attn" in part or "attention" in part for part in name.split("."))
    ]
    if not found:
        raise ValueError(
            f'[lora] target_modules="attention": {type(model).__name__} has no linear layers in '
            'modules named …attn or …attention. Name them, for example ["q_proj", "v_proj"].'
        )
    return found
