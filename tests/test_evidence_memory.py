"""The chapter on memory follows its written rule, and its recipes are what it reads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from evidence.chapter import Verdict
from evidence.chapters import memory
from moebalance.lab.recipe import Recipe
from synthetic_studies import STEPS, study

ROOT = Path(__file__).parents[1]


def sizes(memory_gains: float, adapted: dict[int, float]):
    """Two sizes of a step; the memory's soft MaxVio is lower by so much."""
    found = {}
    settings = (memory.RATE, memory.MEMORY, memory.ADAPTED, memory.SCHEDULED)
    for name, accumulation in zip(memory.SIZES, (1, 8), strict=True):

        def plant(setting: str, seed: int, batching: str):
            noise = 0.001 * ((seed + len(setting)) % 3 - 1)
            gain = memory_gains * (setting == memory.MEMORY)
            cheaper = 0.05 * (setting == memory.SCHEDULED)
            return {"soft_maxvio": 0.5 - gain + noise, "loss": 2.0 - cheaper + noise}

        train = {"batch_size": 4, "accumulation": accumulation}
        about = {"recipe": {"train": train, "data": {"seq_len": 128}}}
        planted = study(name, settings, plant, seeds=3, batchings=("one-domain",), about=about)
        rate = [adapted[accumulation]] * len(STEPS)
        results = [
            replace(run, curve={**run.curve, "rate": rate})
            if run.setting == memory.ADAPTED
            else run
            for run in planted.results
        ]
        found[name] = replace(planted, results=tuple(results))
    return found


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [(0.1, Verdict.HOLDS), (0.0, Verdict.IN_PART), (-0.1, Verdict.NOT_HERE)],
)
def test_memory(gain, verdict):
    rates = {n: 1 - math.exp(-512 * n / 10_000) for n in (1, 8)}
    found = memory.chapter(sizes(gain, rates))
    assert found.verdict is verdict
    assert "by tokens a step: 512: " in found.because
    for n in (1, 8):  # one memory in tokens, whatever the step
        assert f"| {512 * n} | {rates[n]:.3f} | 10,000 |" in found.body
    assert "| 4096 | −0.05" in found.body


def test_a_claim_whose_recipes_were_not_run_says_so():
    found = memory.chapter({})
    assert found.verdict is Verdict.OPEN
    assert "`evidence/recipes/memory_large.toml` can be run" in found.because


def test_the_recipes_of_the_memory_have_its_settings_and_equal_tokens():
    recipes = [Recipe.read(ROOT / f"evidence/recipes/{name}.toml") for name in memory.SIZES]
    tokens = [r.train.steps * r.train.batch_size * r.train.accumulation * 128 for r in recipes]
    assert set(tokens) == {409_600}
    ours = (memory.RATE, memory.MEMORY, memory.ADAPTED, memory.SCHEDULED)
    assert [r.compare.methods for r in recipes] == [ours[:3], ours]
