"""Recipes that no machine can run are refused where they are read, in words."""

from __future__ import annotations

import pytest

from moebalance.lab.recipe import Recipe
from moebalance.words.potentials import read_proportions

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
