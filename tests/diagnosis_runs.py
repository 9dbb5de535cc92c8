"""Runs with a planted fault, or nearly one, for the tests of `moebalance doctor RUN`."""

from __future__ import annotations

import math

import numpy as np

from moebalance.report.diagnosis import Diagnosis, Finding, diagnose, examine
from moebalance.runlog import Run

PHI = "PhiBalancing(potential=NegativeEntropy(), strength=0.03, rate=0.05, load='soft')"
HARD = PHI.replace("soft", "hard")
FREE = "LossFree(speed=0.001, rule='sign', recentre=False)"
NONE = "NoBalancing()"
STEPS, LAYERS, EXPERTS = 300, 2, 16


def even(steps: int = STEPS, spread: float = 0.08, seed: int = 5) -> np.ndarray:
    """Loads that have settled near an even share, each layer in its own way."""
    shares = 1 + spread * np.random.default_rng(seed).uniform(-1, 1, (LAYERS, EXPERTS))
    return np.broadcast_to(shares, (steps, LAYERS, EXPERTS)).copy()


def skewed(factor: float, *, layers: tuple[int, ...] = (0, 1), steps: int = STEPS) -> np.ndarray:
    """Even but for one expert with so many times its share."""
    load = even(steps)
    for layer in layers:
        load[:, layer, 3] = factor * (EXPERTS - 1) / (EXPERTS - factor)
    return load


def turning(factor: float) -> np.ndarray:
    """Skewed, by an expert that is not the same at first and at the end: the router does move."""
    load = skewed(factor)
    load[:10] = load[:10, :, ::-1]
    return load


def waves(period: float, size: float = 0.4, steps: int = STEPS) -> np.ndarray:
    """Even, but layer 0 swings, each expert in its own phase."""
    load = even(steps)
    phase = np.random.default_rng(1).uniform(0, 2 * math.pi, EXPERTS)
    load[:, 0] += size * np.sin(2 * math.pi * np.arange(steps)[:, None] / period + phase)
    return load


def findings(run: Run, *others: Run) -> dict[str, Finding]:
    (_, found), *_ = examine([run, *others])
    return {finding.rule: finding for finding in found}


def falling(rise: float, seed: int = 0) -> np.ndarray:
    """A loss that falls by 3 and rises again by so much over the last third."""
    time = np.linspace(0, 1, STEPS)
    noise = np.random.default_rng(seed).normal(0, 0.05, STEPS)
    return 2 + 3 * np.exp(-8 * time) + rise * np.clip(3 * time - 2, 0, 1) + noise


def dying(at: int, experts: tuple[int, ...] = (2, 7)) -> np.ndarray:
    load = even()
    load[at:, 1, experts] = 1e-4
    return load


def judged(*runs: Run) -> Diagnosis:
    """The diagnosis of the first run's method."""
    return diagnose(runs)[0]
