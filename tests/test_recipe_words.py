"""What a recipe or a command says and nobody would read is refused, with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moebalance.lab.compare import plan
from moebalance.lab.identity import own_method, recipe_method
from moebalance.lab.jobs import compare_all
from moebalance.lab.recipe import Recipe
from moebalance.methods import Method


def parse(**tables: Any) -> Recipe:
    return Recipe.parse({"model": {"architecture": "olmoe"}, **tables}, source="r.toml")


def trained_with(recipe: Recipe) -> Method:
    words, recipe = own_method(recipe)
    return recipe_method(recipe, words)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"methods": {"phii": {"strength": 0.5}}}, "Unknown method 'phii'. Did you mean 'phi'"),
        ({"methods": {"switch": {"strengt": 0.5}}}, "'switch' has no option 'strengt'.*'strength'"),
        ({"methods": {"phi": {"peek": 3}}}, "peek=3: must be true or false"),
        ({"method": {"name": "phi", "strenth": 1}}, "'phi' has no option 'strenth'.*'strength'"),
        ({"method": {"name": "phi+loss-free", "sped": 1}}, "'phi' has no option 'sped'"),
    ],
)
def test_a_table_of_a_method_that_is_not_used_is_read_all_the_same(
    tables: dict[str, Any], message: str, tmp_path: Path
) -> None:
    recipe = parse(**tables, compare={"methods": ["none"]})
    with pytest.raises((ValueError, TypeError), match=message):
        plan(recipe, tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        trained_with(recipe)


@pytest.mark.parametrize(
    ("method", "rate", "strength"),
    [
        ({"name": "phi", "strength": 0.5}, None, 0.5),
        ({"name": "phi(rate=0.2)", "strength": 0.5}, 0.2, 0.5),
        ({"name": "phi+none", "strength": 0.5}, None, 0.5),
        ({"name": "phi"}, None, 0.01),
        ({"name": "phi+none"}, None, 0.25),
    ],
)
def test_options_of_the_own_method_reach_it_however_it_is_named(
    method: dict[str, Any], rate: float | None, strength: float
) -> None:
    made = trained_with(parse(method=method, methods={"phi": {"strength": 0.25}}))
    first = getattr(made, "methods", [made])[0]
    assert (first.rate, first.strength) == (rate, strength)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "phi,phi"}, r"r: \[compare\] methods=.*'phi', 'phi'.*: give each one once"),
        ({"seeds": 0}, r"\[compare\] seeds=.*: give at least one"),
        ({"steps": 0}, r"\[train\] steps=0: must be at least 1"),
    ],
)
def test_words_of_a_command_are_checked_as_those_of_its_recipe(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_all(parse(), tmp_path, **given)


def test_a_recipe_that_is_changed_keeps_the_rest() -> None:
    recipe = parse(train={"steps": 7}, lora=None, method={"name": "switch"})
    assert recipe.changed("train", steps=None) == recipe
    changed = recipe.changed("compare", seeds=range(3))
    assert changed.compare.seeds == (0, 1, 2)
    assert (changed.train, changed.method) == (recipe.train, recipe.method)
