"""A long life in short: what benchmarks/long_life.py does for 100,000 steps, for a few thousand."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.long_life import (
    CLOSED,
    MARKS,
    PAGE,
    RESULTS,
    distinct,
    held_prices,
    life,
    live_closed,
    live_open,
    page,
)
from cases import METHODS, tensors
from moebalance import LossFree

STEPS = 500
CLOSE = 1e-4
"""Of float32 to float64 after so few steps, relative; the page has what it is after 100,000."""

OBEYED = {
    "loss-free": 1.0,
    "loss-free-proportional": 1.0,
    "loss-free-nats": 20.0,
    "smebu": 1.0,
    "quantile-coarse": 2.0,
}
"""Bounds of a price that routers obey: a little more than their affinities differ by."""


@pytest.fixture(scope="module")
def different():
    return distinct()


@pytest.mark.survives(
    "Numbers",
    "Thousands of steps of constant, extreme, empty or huge loads (100,000 by a recipe: "
    "[long lives](long_life.md))",
    "goes on: states are finite and close to float64",
)
def test_states_stay_finite_and_close_to_float64(different):
    assert {name for _, names in different.values() for name in names} >= {
        name for name, method in METHODS.items() if tensors(method.init(8))
    }
    for name, (method, _) in different.items():
        found = life(method, STEPS, closed=False)
        assert found.finite, name
        assert max(found.drift.values()) < CLOSE, (name, found.drift)


@pytest.mark.survives(
    "Numbers",
    "A selection price under constant logits, or under a favourite that changes",
    "goes on: the price stays bounded",
)
@pytest.mark.parametrize("name", OBEYED)
@pytest.mark.parametrize("kind", CLOSED)
def test_a_price_that_routers_obey_stays_bounded(name, kind):
    for _, state in live_closed(METHODS[name], kind, 2 * STEPS):
        for price in held_prices(state):
            assert (price - price.mean()).abs().max() < OBEYED[name]


def test_a_price_that_routers_do_not_obey_grows_by_the_speed_in_every_step():
    """The growth that the page explains; nothing else moves a price of the sign rule."""
    method = LossFree(speed=0.01)
    *_, (_, state) = live_open(method, STEPS, torch.float64)
    skewed = state.price[1].abs()
    assert skewed.max() == pytest.approx(0.01 * STEPS)


def test_the_page_is_made_from_the_results_of_the_whole_recipe(different):
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert results["steps"] == MARKS[-1] == 100_000
    assert results["lives"].keys() == different.keys(), "run benchmarks/long_life.py"
    assert all(row["finite"] for row in results["lives"].values())
    assert PAGE.read_text(encoding="utf-8") == page(results)
