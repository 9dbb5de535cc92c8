"""Recipes that no machine can run are refused where they are read, in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moebalance.files import MOST_DEEP, loads
from moebalance.lab.recipe import Recipe
from moebalance.words.potentials import read_proportions

TINY = '[model]\narchitecture = "qwen3_moe"\n'
HUGE = 2**70
NUMBERS = [
    *(("train", key) for key in ("steps", "batch_size", "accumulation", "eval_sequences")),
    *(("train", key) for key in ("eval_every", "snapshot_every", "save_every")),
    *(("data", key) for key in ("seq_len", "max_bytes_per_domain")),
]


@pytest.mark.parametrize(("section", "key"), NUMBERS)
def test_a_number_beyond_all_machines_is_refused_with_its_place(section: str, key: str) -> None:
    table = {"model": {"architecture": "mixtral"}, section: {key: HUGE}}
    with pytest.raises(ValueError, match=rf"^r\.toml: \[{section}\] {key}={HUGE}: must be "):
        Recipe.parse(table, source="r.toml")


def test_more_sequences_than_can_be_put_in_order_are_refused() -> None:
    train = {"steps": 10**6, "accumulation": 100, "batch_size": 16}
    with pytest.raises(ValueError, match=r"1,600,000,000 sequences.*lower one of them"):
        Recipe.parse({"model": {"architecture": "mixtral"}, "train": train}, source="r.toml")


@pytest.mark.parametrize("text", ["99999999999x1", "0x1, 2x1", "-3x1, 2x1"])
def test_proportions_of_more_experts_than_a_layer_has_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="1 to 1,048,576 experts"):
        read_proportions(text)


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes(b"\xef\xbb\xbf" + TINY.encode())
    assert Recipe.read(file).model == {"architecture": "qwen3_moe"}


@pytest.mark.parametrize("many", [MOST_DEEP, 300, 100_000])
def test_a_recipe_nested_deeper_than_its_log_can_hold_is_refused(tmp_path: Path, many: int) -> None:
    file = tmp_path / "r.toml"
    for nested in (f"a = {'[' * many}{']' * many}", f"{'.'.join('a' * min(many, 5000))} = 1"):
        file.write_text(f"{TINY}[methods.phi]\n{nested}\n")
        with pytest.raises(ValueError, match=r"nested .* deep") as told:
            Recipe.read(file)
        assert str(file) in str(told.value)


def test_the_deepest_recipe_that_is_read_fits_in_a_line_of_a_log(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(f"{TINY}[methods.phi]\na = {'[' * 47}{']' * 47}\n")
    recipe = Recipe.read(file).as_dict()
    assert loads(json.dumps({"recipe": recipe, "parts": [{"settings": recipe}]}))
    file.write_text(f"{TINY}[methods.phi]\na = {'[' * 48}{']' * 48}\n")
    with pytest.raises(ValueError, match="nested 51 deep"):
        Recipe.read(file)
