"""Verdicts follow their written rules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from evidence.chapter import Verdict
from evidence.chapters import (
    finetuning,
    length,
    population,
    potentials,
    rate,
    rivals,
    scale,
    specialisation,
    stability,
)
from evidence.choose import cell
from evidence.study import family
from synthetic_studies import GRID, STEPS, jitter, result, study, swinging


def rows(simulated: float, trained: float, averaged: float = 0.01):
    def source(alone: float):
        return [
            {"sampling": s, "size": n, "rate": r, "excess": alone if r is None else averaged}
            for s in ("mixed", "one-domain")
            for n in (1, 8, 128)
            for r in (None, 0.1)
        ]

    return {"simulated": source(simulated), "trained": source(trained)}


@pytest.mark.parametrize(("trained", "verdict"), [(0.5, Verdict.HOLDS), (0.02, Verdict.NOT_HERE)])
def test_population(trained, verdict):
    found = population.chapter(
        {"population": study("population", (), lambda *_: {}, about=rows(0.7, trained))}
    )
    assert found.verdict is verdict
    assert f"{trained:.3f} nats" in found.because


def against(phi_loss: float, phi_maxvio: float, phi_mi: float = 0.3):
    """Studies in which φ has these numbers and every rival 2.0, 1.0 and 0.3."""

    def plant(setting: str, seed: int, batching: str):
        ours = family(setting) == "phi"
        noise = 0.001 * ((seed * 7 + len(setting)) % 3 - 1)  # what pairing does not cancel
        return {
            "loss": (phi_loss if ours else 2.0) + jitter(seed) + noise,
            "maxvio": (phi_maxvio if ours else 1.0) + noise,
            "mi": (phi_mi if ours else 0.3) + noise,
            "soft_maxvio": 0.2,
        }

    return {
        "recommend_e32": study("recommend_e32", GRID, plant, seeds=1),
        "strengths": study("strengths", STRONGER, plant, seeds=1),
        "one_domain": study("one_domain", GRID, plant, seeds=3, batchings=("one-domain",)),
        "rivals": study("rivals", GRID, plant),
    }


STRONGER = ("phi(strength=0.03)", "switch(strength=0.3)")


@pytest.mark.parametrize(
    ("loss", "maxvio", "verdict", "better"),
    [
        (1.9, 0.5, Verdict.HOLDS, 8),
        (2.0, 0.5, Verdict.IN_PART, 4),
        (2.1, 1.5, Verdict.NOT_HERE, 0),
    ],
)
def test_rivals(loss, maxvio, verdict, better):
    found = rivals.chapter(against(loss, maxvio))
    assert found.verdict is verdict
    assert f"φ is better in {better}," in found.because
    assert "| soft instead of hard |" in found.body


def test_a_default_is_held_against_the_best_setting_of_its_method():
    """Of the settings within 0.01 nats of the lowest loss, the one with the lowest MaxVio."""
    planted = {"phi(strength=0.03)": (1.95, 0.8), "switch(strength=0.3)": (2.1, 0.1)}

    def plant(setting: str, seed: int, batching: str):
        loss, maxvio = planted.get(setting, (2.0, 1.0))
        return {"loss": loss, "maxvio": maxvio}

    studies = against(2.0, 1.0) | {
        name: study(name, settings, plant, seeds=1)
        for name, settings in (("recommend_e32", GRID), ("strengths", STRONGER))
    }
    body = rivals.chapter(studies).body
    assert "| `phi` | 2 | 2.000 | 1.00 | `phi(strength=0.03)` | 1.950 | 0.80 | 0.050 |" in body
    assert (
        "| `switch` | 2 | 2.000 | 1.00 | `switch(strength=0.01)` | 2.000 | 1.00 | 0.000 |" in body
    )
    assert "| `global-batch` | 1 |" not in body


def test_a_regret_compares_runs_of_the_same_seeds():
    def plant(setting: str, seed: int, batching: str):
        return {"loss": 2.0 + seed, "maxvio": 1.0}

    studies = against(2.0, 1.0) | {
        "recommend_e32": study("recommend_e32", GRID, plant, seeds=2),
        "strengths": study("strengths", STRONGER, plant, seeds=1),
    }
    body = rivals.chapter(studies).body
    assert "| `phi` | 2 | 2.000 | 1.00 | `phi(strength=0.01)` | 2.000 | 1.00 | 0.000 |" in body
    assert "on seed 0, mixed text" in body


def test_settings_with_fewer_seeds_are_named():
    whole = study("s", ("none", "phi", "switch"), lambda *_: {}, seeds=3)
    assert rivals.seeds_of(whole) == "3 seeds each."
    kept = [r for r in whole.results if r.seed < {"none": 3, "phi": 2, "switch": 1}[r.setting]]
    part = replace(whole, results=tuple(kept))
    assert rivals.seeds_of(part) == "3 seeds each, but 2 for `phi`; 1 for `switch`."


def test_the_effect_of_an_ingredient_is_the_difference_of_its_twins():
    def plant(setting: str, seed: int, batching: str):
        where = cell(setting)
        gain = (
            0.0 if where is None else 0.5 * (where.load == "soft") + 0.25 * (where.memory == "EMA")
        )
        return {"loss": 2.0 - gain + jitter(seed)}

    grid = study("grid", GRID, plant)
    for part, to, of, expected in (
        ("load", "soft", "hard", -0.5),
        ("memory", "EMA", "step", -0.25),
        ("memory", "step", "batch", 0.0),
        ("potential", "log", "linear", 0.0),
    ):
        assert rivals.effect(grid, part, to, of, "loss").mean == pytest.approx(expected)


POTENTIALS = ("Euclidean", "LpNorm", "NegativeEntropy")


@pytest.mark.parametrize(
    ("planted", "verdict", "rank"),
    [
        ((1.0, 2.0, 0.1), Verdict.HOLDS, 1),
        ((0.2, 2.0, 0.1), Verdict.NOT_HERE, 1),  # within the noise of one run
        ((0.1, 2.0, 1.0), Verdict.NOT_HERE, 2),
    ],
)
def test_potentials(planted, verdict, rank):
    settings = {f"phi(potential='{p}')": v for p, v in zip(POTENTIALS, planted, strict=True)}
    nine = study("p", tuple(settings), lambda s, *_: {"maxvio": settings[s]}, seeds=2)
    noisy = study("rivals", GRID, lambda s, seed, _: {"maxvio": 1 + 0.2 * seed})
    found = potentials.chapter({"potentials": nine, "rivals": noisy})
    assert found.verdict is verdict
    assert f"rank {rank} of 3" in found.because
    assert "| NegativeEntropy | 32 |" in found.body
    assert "| Euclidean | 1 |" in found.body


@pytest.mark.parametrize(
    ("best", "verdict"), [(0.1, Verdict.NOT_HERE), (1.0, Verdict.HOLDS), (None, Verdict.IN_PART)]
)
def test_rate(best, verdict):
    settings = tuple(f"phi(strength={a}, rate={r})" for a in (0.01, 0.03) for r in (0.03, 0.1, 1.0))

    def plant(setting: str, seed: int, batching: str):
        here = best if best is not None else (0.1 if batching == "mixed" else 1.0)
        return {"maxvio": 0.5 if f"rate={here})" in setting else 2.0}

    both = ("mixed", "one-domain")
    large = study("rate", settings, plant, seeds=2, batchings=both)
    large = replace(large, results=(swinging(large.results[0], 24), *large.results[1:]))
    found = rate.chapter({"rate": large, "rivals": study("rivals", GRID, lambda *_: {})})
    assert found.verdict is verdict
    assert "| 0.01 | 0.03 | mixed | 24 | 0.50 |" in found.body
    if best == 0.1:  # 1024 tokens / −ln(0.9)
        assert "| mixed | 0.01 | 0.1 | 9,719 | 0.50 |" in found.body


def test_recovery_is_read_off_the_curve():
    values = [1.0] * 20 + [4.0, 3.0, 1.2] + [1.0] * 17
    run = result("phi", 0, "shift", {}, curve={"maxvio": values})
    assert len(values) == len(STEPS)
    assert stability.recovery(run) == {"before": 1.0, "peak": 4.0, "after": 1.0, "recovery": 60.0}
    never = result("phi", 0, "shift", {}, curve={"maxvio": [1.0] * 20 + [4.0] * 20})
    assert stability.recovery(never)["recovery"] is None


@pytest.mark.parametrize(
    ("phi", "verdict"), [(0.05, Verdict.HOLDS), (0.2, Verdict.IN_PART), (0.9, Verdict.NOT_HERE)]
)
def test_stability(phi, verdict):
    ginis = {"none": 0.6, "switch": 0.1, "loss-free": 0.1, "phi": phi, rivals.RECOMMENDED: 0.01}

    def plant(setting: str, seed: int, batching: str):
        return {"gini": ginis.get(family(setting), 0.3)}

    studies = {
        "rivals": study("rivals", GRID, plant),
        "shift": study("shift", GRID, plant, seeds=3),
    }
    assert stability.chapter(studies).verdict is verdict


@pytest.mark.parametrize(("mi", "verdict"), [(0.6, Verdict.HOLDS), (0.3, Verdict.NOT_HERE)])
def test_specialisation(mi, verdict):
    assert specialisation.chapter(against(2.0, 1.0, mi)).verdict is verdict


FINETUNE = ("none", "switch", "loss-free", "phi")


@pytest.mark.parametrize(
    ("loss", "verdict"),
    [(1.5, Verdict.HOLDS), (1.95, Verdict.IN_PART), (2.5, Verdict.NOT_HERE)],
)
def test_finetuning(loss, verdict):
    rival = {"none": 2.0, "switch": 1.95, "loss-free": 2.1}

    def plant(setting: str, seed: int, batching: str):
        noise = 0.0005 * ((seed + len(setting)) % 3 - 1)
        return {"loss": rival.get(setting, loss) + jitter(seed) + noise}

    found = finetuning.chapter({"finetune": study("finetune", FINETUNE, plant, seeds=3)})
    assert found.verdict is verdict


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [((0.0, -0.1, -0.2), Verdict.IN_PART), ((-0.2, -0.1, 0.0), Verdict.UNTESTED)],
)
def test_scale(gaps, verdict):
    ladder = {}
    for i, (name, ahead) in enumerate(zip(("rivals", *scale.LARGER), gaps, strict=True)):

        def plant(setting: str, seed: int, batching: str, ahead: float = ahead):
            noise = 0.001 * ((seed + len(setting)) % 3 - 1)
            return {"loss": 2.0 + jitter(seed) + noise + ahead * (family(setting) == "phi")}

        size = {"model": {"active_parameters": 1000 * 4**i}}
        ladder[name] = study(name, GRID, plant, seeds=3, about=size)
    found = scale.chapter(ladder)
    assert found.verdict is verdict
    alone = scale.chapter({"rivals": ladder["rivals"]})
    assert alone.verdict is Verdict.UNTESTED
    assert "ready to run: `evidence/recipes/scale_large.toml`" in alone.because


def course(losses: dict[str, tuple[float, float]], vios: tuple[float, float]):
    """A study with two evaluations, whose losses and MaxVio of φ are given."""
    settings = ("none", "switch", "loss-free", "phi", rivals.RECOMMENDED)
    whole = study("longer", settings, lambda *_: {}, seeds=1)
    results = []
    for run in whole.results:
        pair = zip(run.evals, losses.get(run.setting, (2.1, 2.0)), vios, strict=True)
        evals = tuple({**row, "loss": loss, "maxvio": vio} for row, loss, vio in pair)
        results.append(replace(run, evals=evals))
    return {"longer": replace(whole, results=tuple(results))}


@pytest.mark.parametrize(
    ("losses", "vios", "verdict"),
    [
        ({"none": (2.0, 2.0)}, (1.0, 0.5), Verdict.HOLDS),
        ({"none": (2.0, 2.0), "switch": (2.0, 2.1)}, (1.0, 0.5), Verdict.IN_PART),
        ({"none": (2.0, 2.0), "switch": (2.0, 2.1)}, (1.0, 1.5), Verdict.NOT_HERE),
    ],
)
def test_length(losses, vios, verdict):
    found = length.chapter(course(losses, vios))
    assert found.verdict is verdict
    assert "φ-balancing +0.100 to +0.000" in found.because
