"""Studies with planted results, to hold the rule of every verdict against what was planted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from evidence.study import Result, Study
from moebalance.report.diagnosis.oscillation import Swing
from moebalance.words.methods import without_options

Planted = Callable[[str, int, str], Mapping[str, float]]
"""Final numbers of a setting, a seed and a kind of micro-batch."""

GRID = (
    "none",
    "switch(strength=0.01)",
    "global-batch(strength=0.01)",
    "ema-switch(strength=0.01, rate=0.1)",
    "plug-in(potential='Euclidean', strength=0.01)",
    "plug-in(potential='Euclidean', window='step', strength=0.01)",
    "phi(potential='Euclidean', strength=0.01)",
    "plug-in(load='hard', strength=0.01)",
    "plug-in(load='hard', window='step', strength=0.01)",
    "phi(load='hard', strength=0.01)",
    "plug-in(strength=0.01)",
    "plug-in(window='step', strength=0.01)",
    "phi(strength=0.01)",
    "loss-free(speed=0.001)",
    "smebu",
    "phi(strength=0.001)+loss-free(scale='nats')",
)
_FINAL = {
    "loss": 2.0,
    "maxvio": 1.0,
    "soft_maxvio": 0.2,
    "soft_hard_gap": 0.1,
    "gini": 0.2,
    "mi": 0.3,
    "purity": 0.5,
    "dead_experts": 0.0,
    "churn": 0.4,
    "top_pair_lift": 4.0,
    "router_similarity": 0.2,
    "old_loss": 2.0,
    "old_maxvio": 1.0,
}
STEPS = [float(step) for step in range(20, 801, 20)]


def jitter(seed: int) -> float:
    """Small noise that all settings of a seed share, and that averages out over five."""
    return (0.0, 0.01, -0.01, 0.02, -0.02)[seed % 5]


def result(
    setting: str, seed: int, batching: str, final: Mapping[str, float], **more: Any
) -> Result:
    """A run whose last evaluation is `final`, with flat curves unless given."""
    numbers = {**_FINAL, **final}
    evals = [{"step": 100, **numbers}, {"step": 200, **numbers}]
    del evals[0]["churn"]
    curve = {
        name: [numbers[name]] * len(STEPS) for name in ("loss", "maxvio", "gini", "soft_maxvio")
    }
    word = without_options(setting)
    return Result(
        word,
        setting,
        seed,
        batching,
        tuple(evals),
        {"step": STEPS, **curve, **more.pop("curve", {})},
        **more,
    )


def study(
    name: str,
    settings: tuple[str, ...],
    plant: Planted,
    *,
    seeds: int = 5,
    batchings: tuple[str, ...] = ("mixed",),
    about: Mapping[str, Any] | None = None,
) -> Study:
    """A study of these settings."""
    results = [
        result(setting, seed, batching, plant(setting, seed, batching))
        for batching in batchings
        for setting in settings
        for seed in range(seeds)
    ]
    common = {
        "commits": ["0" * 40],
        "versions": {"moebalance": "0"},
        "model": {"active_parameters": 1000},
        "steps": 200,
        "recipe": {"train": {"batch_size": 8, "accumulation": 1}, "data": {"seq_len": 128}},
    }
    return Study(name, {**common, **(about or {})}, tuple(results))


def swinging(result: Result, period: int) -> Result:
    """The same run, oscillating."""
    return replace(result, swing=(Swing(0.5, -0.9, 0.8, period),))
