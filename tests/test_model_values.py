"""Values that make no model are refused in words, wherever a configuration is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from experiments import MODEL, small, write_text
from moebalance.lab.cli import app
from moebalance.lab.inputs import build_model
from moebalance.lab.recipe import Recipe
from moebalance.lab.text.tokens import ByteTokenizer

SIZES = {key: value for key, value in MODEL.items() if key != "architecture"}

ODD = {
    "a word for a number": {"hidden_size": "big"},
    "nothing for a number": {"hidden_size": None},
    "a number for a list": {"mlp_only_layers": 3},
    "a name that is none": {"hidden_act": "selu99"},
    "no width": {"hidden_size": 0},
    "no heads": {"num_attention_heads": 0},
    "unknown layers": {"layer_types": ["a"]},
    "a padding that no token has": {"pad_token_id": 10**9},
}
"""Values on which Transformers raises what is its own affair: eight kinds of errors."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a checkpoint with random weights."""
    root = tmp_path_factory.mktemp("values")
    (root / "text").mkdir()
    write_text(root / "text")
    config = AutoConfig.for_model("qwen3_moe", vocab_size=257, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "model")
    ByteTokenizer().save_beside(root / "model")
    return root


def toml(folder: Path, text: Path, model: dict[str, object]) -> Path:
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in model.items())
    data = f"source = {json.dumps(str(text))}\nseq_len = 32\n"
    path = folder / "r.toml"
    path.write_text(f"[model]\n{lines}\n[data]\n{data}[train]\nsteps = 1\nbatch_size = 2\n")
    return path


def refusal(*arguments: object) -> str:
    """What the command says as it refuses."""
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 2, (done.output, done.exception)
    assert "Traceback" not in done.output
    return done.output.replace("\n", "")


def changed(checkpoint: Path, folder: Path, values: dict[str, object]) -> Path:
    shutil.copytree(checkpoint, folder / "it")
    config = folder / "it" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    return folder / "it"


@pytest.mark.parametrize("odd", ODD)
def test_a_configuration_that_makes_no_model_is_refused_by_its_path(
    root: Path, tmp_path: Path, odd: str
) -> None:
    folder = changed(root / "model", tmp_path, ODD[odd])
    assert str(folder) in refusal("doctor", folder)
    assert str(folder / "config.json") in refusal("doctor", folder / "config.json")
    recipe = toml(tmp_path, root / "text", {"checkpoint": str(folder)})
    assert str(folder) in refusal("finetune", recipe, "--out", tmp_path / "out")


@pytest.mark.parametrize("odd", [odd for odd in ODD if None not in ODD[odd].values()])
def test_keys_of_a_recipe_that_make_no_model_are_refused(
    root: Path, tmp_path: Path, odd: str
) -> None:
    scratch = toml(tmp_path, root / "text", {**MODEL, **ODD[odd]})
    assert "[model] " in refusal("train", scratch, "--out", tmp_path / "out")
    tuned = toml(tmp_path, root / "text", {"checkpoint": str(root / "model"), **ODD[odd]})
    assert "[model]" in refusal("finetune", tuned, "--out", tmp_path / "tuned")


@pytest.mark.parametrize("architecture", [3, ["qwen3_moe"], "qwen3moe"])
def test_an_architecture_that_is_none_is_refused(
    root: Path, tmp_path: Path, architecture: object
) -> None:
    recipe = toml(tmp_path, root / "text", {**MODEL, "architecture": architecture})
    said = refusal("train", recipe, "--out", tmp_path / "out")
    assert "[model] architecture=" in said
    assert "causal language model of the installed Transformers" in said


def test_the_size_of_the_vocabulary_is_the_tokenisers_to_say(root: Path, tmp_path: Path) -> None:
    recipe = toml(tmp_path, root / "text", {**MODEL, "vocab_size": 300})
    said = refusal("train", recipe, "--out", tmp_path / "out")
    assert "[model] vocab_size=300: the tokeniser sets it, here to 257" in said
    assert '[data] tokenizer = "bpe"' in said


@pytest.mark.parametrize("damage", ["cut", "too long a header"])
def test_a_damaged_file_of_weights_is_refused_by_its_name(
    root: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(root / "model", tmp_path / "it")
    weights = tmp_path / "it" / "model.safetensors"
    whole = weights.read_bytes()
    header = (2**62).to_bytes(8, "little") + b"{}"
    weights.write_bytes(whole[: len(whole) // 2] if damage == "cut" else header)
    recipe = toml(tmp_path, root / "text", {"checkpoint": str(tmp_path / "it")})
    said = refusal("finetune", recipe, "--out", tmp_path / "out")
    assert f"{weights} is damaged" in said


def test_a_weight_of_another_shape_is_named(root: Path, tmp_path: Path) -> None:
    folder = changed(root / "model", tmp_path, {"vocab_size": 300})
    recipe = toml(tmp_path, root / "text", {"checkpoint": str(folder)})
    said = refusal("finetune", recipe, "--out", tmp_path / "out")
    assert "mismatched keys lm_head.weight, model.embed_tokens.weight. They would start" in said


def test_a_key_that_only_the_models_code_reads_is_a_key(root: Path) -> None:
    recipe = small(root / "text")
    model = {**recipe.model, "head_dim": 4}
    made = build_model(Recipe.parse({"model": model}, source="r.toml"), vocab_size=257)
    assert made.model.layers[0].self_attn.head_dim == 4
    with pytest.raises(ValueError, match="Did you mean 'head_dim'"):
        build_model(
            Recipe.parse({"model": {**model, "heads_dim": 4}}, source="r.toml"), vocab_size=257
        )
