"""Fine-tuning refuses what it cannot do, with the reason, before a run is begun."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import moebalance as mb
from experiments import MODEL
from moebalance.lab.recipe import FINAL, Recipe
from moebalance.lab.text.tokens import TOKENIZER_FILE, ByteTokenizer
from moebalance.lab.train import train_run
from moebalance.runlog import LOG_NAME

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own

SIZES = {key: value for key, value in MODEL.items() if key != "architecture"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """A fine-tuning recipe as TOML would give it, of a checkpoint with random weights."""
    root = tmp_path_factory.mktemp("refusals")
    lines = (f"{number} run! go? sit, eat;\n" for number in range(300))
    (root / "verbs.txt").write_text("".join(lines))
    config = AutoConfig.for_model("qwen3_moe", vocab_size=257, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    ByteTokenizer().save_beside(root / "model")
    return {
        "model": {"checkpoint": str(root / "model")},
        "data": {"source": str(root / "verbs.txt"), "seq_len": 32},
        "train": {"steps": 1, "batch_size": 2, "eval_sequences": 2},
    }


def parse(table: dict[str, dict[str, object]], **changes: object) -> Recipe:
    """The recipe with keys of its tables changed: `model={"dtype": "bfloat16"}`, `lora={}`."""
    changed = {key: {**table.get(key, {}), **value} for key, value in changes.items()}
    return Recipe.parse({**table, **changed}, source="f.toml")


def run(recipe: Recipe, folder: Path) -> Path:
    return train_run(recipe, method="phi", seed=0, batching="mixed", folder=folder)


def broken(name: str, checkpoint: Path, folder: Path) -> Path:
    """A checkpoint with something wrong."""
    if name == "missing":
        return folder / "nowhere"
    if name == "run folder":
        shutil.copytree(checkpoint, folder / "run" / FINAL)
        return folder / "run"
    shutil.copytree(checkpoint, folder / "it")
    changed = load_file(folder / "it" / "model.safetensors")
    if name == "no weights":
        (folder / "it" / "model.safetensors").unlink()
    elif name == "adapter":
        (folder / "it" / "adapter_config.json").write_text("{}")
    elif name == "no tokeniser":
        (folder / "it" / TOKENIZER_FILE).unlink()
    elif name == "part of the weights":
        del changed["model.layers.1.mlp.gate.weight"]
        save_file(changed, folder / "it" / "model.safetensors", metadata={"format": "pt"})
    else:
        kind = {"dense": "qwen3", "no language model": "vit"}[name]
        config = AutoConfig.for_model(kind, vocab_size=257, **SIZES)
        if kind == "qwen3":
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / "it")
        config.save_pretrained(folder / "it")
    return folder / "it"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", r"there is no folder .*nowhere.*nothing is downloaded"),
        ("run folder", r"no config.json.* Did you mean '.*run/final'\?"),
        ("no weights", r"a config.json but no weights"),
        ("adapter", r"holds a PEFT adapter, not a whole model: merge it"),
        ("no tokeniser", r"holds no tokeniser .*say \[data\] tokenizer = \"bytes\""),
        ("part of the weights", r"missing keys model.layers.1.mlp.gate.weight"),
        ("dense", r"no MoE router"),
        ("no language model", r"a vit model, which is no causal language model"),
    ],
)
def test_what_cannot_be_fine_tuned_is_refused_with_the_reason(table, tmp_path, name, message):
    folder = broken(name, Path(str(table["model"]["checkpoint"])), tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(parse(table, model={"checkpoint": str(folder)}), tmp_path / "run")
    assert not (tmp_path / "run" / LOG_NAME).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"architecture": "qwen3_moe"}}, "both architecture .* and checkpoint"),
        ({"model": {"checkpoint": 3}}, "checkpoint must be the path"),
        ({"old_data": {"seq_len": 64}}, r"\[old_data\] seq_len=64 differs from \[data\]'s 32"),
        ({"lora": {"rank": 4}}, r"\[lora\]: unknown key 'rank'"),
        ({"lora": {"r": 0}}, r"r=0: must be at least 1"),
        ({"lora": {"target_modules": "all-linear"}}, 'give "attention", or a list'),
        ({"lora": {"train_router": "yes"}}, "must be true or false"),
    ],
)
def test_a_fine_tuning_recipe_says_what_is_wrong_with_it(table, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(table, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hidden_sizes": 8}}, "no configuration key 'hidden_sizes'. Did you mean"),
        ({"data": {"tokenizer": "bpe", "vocab_size": 260}}, "260 ids and the checkpoint 257"),
        ({"data": {"seq_len": 48}}, "seq_len=48: the checkpoint was made for at most 32"),
        ({"lora": {"target_modules": ["nothing"]}}, r"\[lora\] target_modules=.* does not fit"),
        ({"lora": {"target_modules": ["gate"]}}, "train_router trains them whole"),
    ],
)
def test_a_recipe_that_does_not_fit_the_checkpoint_is_refused(table, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(parse(table, **changes), tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda held: {k: t * torch.nan for k, t in held.items()}, "belongs to the weights"),
        (lambda held: {k: t[:-1].clone() if t.dim() else t for k, t in held.items()}, "not fit"),
        (lambda held: None, "is damaged"),
    ],
    ids=["NaN", "fewer experts", "cut off"],
)
def test_a_balancing_state_of_the_same_method_goes_on_or_is_refused(
    table, tmp_path, change, reason
):
    shutil.copytree(table["model"]["checkpoint"], tmp_path / "it")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    with mb.attach(model, mb.PhiBalancing()) as balancing:
        path = mb.huggingface.save(balancing, tmp_path / "it")
    recipe = parse(table, model={"checkpoint": str(tmp_path / "it")})
    run(recipe, tmp_path / "sound")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    changed = change(load_file(path))
    if changed is None:
        path.write_bytes(path.read_bytes()[:50])
    else:
        save_file(changed, path, metadata=metadata)
    with pytest.raises(ValueError, match=reason) as refused:
        run(recipe, tmp_path / "damaged")
    assert str(path) in str(refused.value)
    assert not (tmp_path / "damaged" / LOG_NAME).exists()


def test_tables_for_fine_tuning_need_a_checkpoint():
    scratch = {"architecture": "qwen3_moe"}
    for section in ("lora", "old_data"):
        with pytest.raises(ValueError, match=rf"\[{section}\] is for fine-tuning"):
            Recipe.parse({"model": scratch, section: {}}, source="r.toml")
    with pytest.raises(ValueError, match='tokenizer="checkpoint" needs'):
        Recipe.parse({"model": scratch, "data": {"tokenizer": "checkpoint"}}, source="r.toml")


def test_a_checkpoint_gets_a_gentle_learning_rate_and_its_own_tokeniser(table):
    bare = {"model": table["model"]}
    assert parse(bare).train.learning_rate == 2e-5
    assert parse(bare, lora={}).train.learning_rate == 2e-4
    assert parse(bare).data.tokenizer == "checkpoint"
    scratch = {"architecture": "qwen3_moe"}
    assert Recipe.parse({"model": scratch}, source="r.toml").data.tokenizer == "bytes"


def test_the_recipe_in_the_documentation_is_one():
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text("utf-8")
    section = text.partition("## Fine-tuning")[2].partition("\n## ")[0]
    (example,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    recipe = Recipe.parse(tomllib.loads(example), source="docs/recipes.md")
    assert recipe.lora is not None
    assert recipe.old_data is not None
    assert recipe.train.learning_rate == 2e-4


def test_a_recipe_read_back_from_a_log_is_the_same(table):
    recipe = parse(table, lora={"target_modules": ["q_proj"]}, old_data={"source": "python"})
    logged = json.loads(json.dumps(recipe.as_dict()))
    assert Recipe.parse(logged, source="log").as_dict() == recipe.as_dict()
