"""Results keep what they are made of, and pages are made of them alone."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import moebalance as mb
from evidence.__main__ import missing, refuse_without_clone
from evidence.aims import Aim, aim_of
from evidence.chapter import Verdict
from evidence.chapters import (
    CHAPTERS,
    rivals,
)
from evidence.chapters.recommended import CELLS
from evidence.choose import Cell, cell, choose
from evidence.keep import RECIPES, RESULTS, gather, keep, load, recipe_file
from evidence.pages import write_page
from evidence.population import plug_in_bias, sequence_scores, simulated_scores
from evidence.study import family, read, write
from families import tiny, tokens
from moebalance.lab.compare import run_name
from moebalance.lab.recipe import Recipe
from moebalance.report.diagnosis.oscillation import swing
from moebalance.runlog import find_runs, read_run
from synthetic_runs import write_run
from synthetic_studies import GRID, jitter, study

ROOT = Path(__file__).parents[1]
SEEDS = range(5)


# --- what is measured ---------------------------------------------------------------------------


def loads(values: np.ndarray, tokens: int = 4096, seed: int = 0) -> list[list[float]]:
    """Loads that batches of so many assignments show of the proportions 1 + values."""
    random = np.random.default_rng(seed)
    shares = (1 + values) / (1 + values).sum(axis=1, keepdims=True)
    return [(random.multinomial(tokens, share) / tokens).tolist() for share in shares]


@pytest.mark.parametrize("period", [10, 26, 50, 80])
def test_an_oscillation_is_found_with_its_period_and_size(period):
    phases = np.random.default_rng(1).uniform(0, 2 * math.pi, 32)
    found = swing(loads(0.3 * np.sin(2 * math.pi * np.arange(200)[:, None] / period + phases)))
    assert found.oscillates
    assert found.period == pytest.approx(period, rel=0.1)
    assert found.amplitude == pytest.approx(0.3 / math.sqrt(2), rel=0.15)


@pytest.mark.parametrize("kind", ["noise", "drift", "bend", "walk"])
def test_noise_and_drift_are_no_oscillation(kind):
    random = np.random.default_rng(2)
    time, signs = np.linspace(-1, 1, 200)[:, None], random.choice([-1, 1], 32)
    values = {
        "noise": np.zeros((200, 32)),
        "drift": 0.4 * time * signs,
        "bend": 0.4 * time**2 * signs,
        "walk": np.clip(0.03 * random.normal(size=(200, 32)).cumsum(axis=0), -0.9, None),
    }[kind]
    assert not swing(loads(values)).oscillates


def test_constant_loads_do_not_swing():
    assert swing([[0.5, 0.5]] * 20) == (0.0, 0.0, 0.0, 0)


def test_phi_of_a_batch_is_biased_as_the_variance_says():
    """To second order ½ Σ var(l̂_e) / m_e, which falls as 1/n for independent sequences."""
    scores, domains = simulated_scores(num_experts=4, favour=0.4, per_domain=400)
    found = {
        (r["sampling"], r["size"], r["rate"]): r["excess"]
        for r in plug_in_bias(scores, domains, sizes=(1, 16, 64))
    }
    expected = 0.5 * (scores.var(axis=0) / scores.mean(axis=0)).sum()
    assert found["mixed", 1, None] == pytest.approx(expected, rel=0.15)
    assert found["mixed", 16, None] == pytest.approx(found["mixed", 1, None] / 16, rel=0.15)
    assert found["one-domain", 64, None] > 30 * found["mixed", 64, None]
    # A moving average of independent batches has η / (2 − η) of a batch's variance.
    assert found["one-domain", 64, 0.1] == pytest.approx(
        found["one-domain", 64, None] * 0.1 / 1.9, rel=0.25
    )


# --- what is kept -------------------------------------------------------------------------------


def test_a_study_is_kept_and_read_back(tmp_path):
    recipe = {"model": {}, "data": {}, "train": {"steps": 60}}
    for seed in (0, 1):
        path = tmp_path / "runs/mixed" / f"phi-seed{seed}"
        write_run(path, "phi", seed=seed, steps=60, header={"recipe": recipe})
    made = gather("s", tmp_path / "runs", ["phi"])
    write(made, tmp_path / "s.jsonl")
    again = read(tmp_path / "s.jsonl")
    assert [r.seed for r in again.results] == [0, 1]
    assert again.about["commits"] == ["0123abc"]
    assert again.name == "s"
    assert again.mean("phi", "maxvio") == pytest.approx(made.mean("phi", "maxvio"), rel=1e-4)
    curve = again.results[0].curve
    assert len(curve["step"]) == len(curve["maxvio"]) <= 60
    assert curve["step"][-1] == 60


def test_of_a_study_about_proportions_and_groups_every_run_is_judged_by_them(tmp_path):
    settings = ["none", "switch(proportions='8x4, 24x1')"]
    grouped = "phi(potential={'name': 'Euclidean', 'groups': 4})"
    aim = aim_of([*settings, grouped])
    assert aim == Aim((4.0,) * 8 + (1.0,) * 24, 4)
    assert aim_of(GRID) == Aim() == aim_of([grouped, grouped.replace("4", "2")])
    load = np.random.default_rng(0).dirichlet(np.ones(32), size=2)
    rho = np.array([4.0] * 8 + [1.0] * 24) / 56
    judged = aim.judge(load.tolist())
    assert judged == pytest.approx(
        {
            "aim_maxvio": ((load / rho).max(axis=1) - 1).mean(),
            "aim_gap": np.abs(load - rho).sum(axis=1).mean() / 2,
            "group_maxvio": (load.reshape(2, 4, 8).sum(-1).max(axis=1) * 4 - 1).mean(),
        }
    )
    header = {"recipe": {"model": {}, "data": {}, "train": {"steps": 60}}}
    folder = tmp_path / "runs/mixed" / run_name(settings[0], 0)
    write_run(folder, "none", seed=0, steps=60, header=header, experts=32)
    (kept,) = gather("s", tmp_path / "runs", settings).results
    last = read_run(folder).evals[-1]
    assert kept.final["aim_gap"] == pytest.approx(aim.judge(last["load"])["aim_gap"])


def test_a_study_with_an_unfinished_run_is_refused(tmp_path):
    write_run(tmp_path / "mixed/phi-seed0", "phi", seed=0, steps=60)
    log = tmp_path / "mixed/phi-seed0/log.jsonl"
    kept = [line for line in log.read_text().splitlines(True) if '"eval"' not in line]
    log.write_text("".join(kept))
    with pytest.raises(ValueError, match="not whole"):
        gather("s", tmp_path, ["phi"])


def test_a_file_that_is_no_study_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"kind": "header"}\n')
    with pytest.raises(ValueError, match="must name the study"):
        read(tmp_path / "x.jsonl")


# --- how settings are chosen --------------------------------------------------------------------


def test_the_rule_takes_the_best_balance_among_the_lowest_losses():
    planted = {
        "phi(strength=0.001)": (2.000, 2.0),
        "phi(strength=0.003)": (2.009, 1.0),
        "phi(strength=0.01)": (2.020, 0.1),
        "none": (2.1, 4.0),
    }
    sweep = study(
        "sweep",
        tuple(planted),
        lambda s, seed, _: {"loss": planted[s][0] + jitter(seed), "maxvio": planted[s][1]},
    )
    assert choose(sweep) == {"phi": "phi(strength=0.003)", "none": "none"}


def test_the_grid_has_all_twelve_cells():
    cells = {found for setting in GRID if (found := cell(setting))}
    assert len(cells) == 12
    assert cells == {
        Cell(s, m, p)
        for s in ("hard", "soft")
        for m in ("batch", "step", "EMA")
        for p in ("linear", "log")
    }


def test_a_family_is_a_method_without_its_strength():
    assert len({family(s) for s in GRID}) == len(GRID)
    assert family("loss-free(speed=0.003)") == "loss-free"


# --- the room -----------------------------------------------------------------------------------


def same_picture(svg: str) -> str:
    """A figure without the names of its clips, which digest the last bits of coordinates."""
    return re.sub(r"\bp[0-9a-f]{10}\b", "clip", svg)


def test_the_page_in_the_documentation_is_that_of_the_committed_results(tmp_path):
    write_page(load(), tmp_path / "evidence.md")
    made, committed = tmp_path / "evidence.md", ROOT / "docs/evidence.md"
    assert made.read_text("utf-8") == committed.read_text("utf-8")
    figures = {file.name for file in (ROOT / "docs/evidence").iterdir()}
    assert figures == {file.name for file in (tmp_path / "evidence").iterdir()}
    for name in figures:
        ours, theirs = (
            same_picture((folder / "evidence" / name).read_text("utf-8"))
            for folder in (tmp_path, ROOT / "docs")
        )
        assert ours == theirs, name


def test_every_recipe_can_be_read_and_is_named_as_its_file():
    for file in RECIPES.rglob("*.toml"):
        assert Recipe.read(file).name == file.stem
        assert file.parent.name == "checkpoints" or recipe_file(file.stem) == file


def test_results_are_of_recipes_that_are_there():
    studies = load()
    for name, kept in studies.items():
        recipe = Recipe.read(recipe_file(name))
        assert kept.name == name
        assert set(kept.settings()) <= set(recipe.compare.methods)
        assert set(kept.seeds()) <= set(recipe.compare.seeds)
    assert set(missing(RESULTS)) == {"scale_gpu", "scale_large"}
    needed = {name for claim in CHAPTERS for name in claim.needs}
    assert needed <= set(studies)


def test_methods_are_reported_at_their_defaults_on_seeds_that_nothing_was_chosen_on():
    studies = load()
    chosen = {seed for name in (*CELLS, "strengths") for seed in studies[name].seeds()}
    for name in rivals.TEXTS:
        assert set(studies[name].families()) <= set(studies[name].settings())
        # One cell of the grid needs a strength that is no default.
        more = set(studies[name].settings()) - set(studies[name].families())
        assert more == ({"global-batch(strength=0.01)"} if name == "one_domain" else set())
        assert not chosen & set(studies[name].seeds())


def test_the_page_says_how_long_its_runs_are():
    steps = {name: kept.about["steps"] for name, kept in load().items()}
    short = {"target_qwen", "target_olmoe", "target_glm", "target_course"}
    short |= {"proportions", "groups", "memory_small", "memory_large"}
    assert {steps[name] for name in short} == {100, 400, 800}
    assert steps["longer"] == 5000
    assert {steps[name] for name in steps.keys() - short - {"longer", "demo"}} == {2000}
    used = {number for number, c in enumerate(CHAPTERS, start=1) if short & {*c.needs}}
    assert used == {10, 11, 12}


def test_outside_a_clone_it_says_what_is_missing(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").touch()
    with pytest.raises(FileNotFoundError, match=r"no evidence/recipes and no evidence/results"):
        refuse_without_clone(tmp_path)
    refuse_without_clone(ROOT)


def test_a_recipe_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(FileNotFoundError, match=r"No recipe 'rivalz'\. There are demo, .*rivals"):
        recipe_file("rivalz")


@pytest.mark.parametrize("number", range(len(CHAPTERS)))
def test_a_claim_without_results_is_not_run_yet(number):
    found = CHAPTERS[number]({})
    assert found.verdict is Verdict.OPEN
    assert "can be run" in found.because


def test_runs_whose_report_is_a_page_are_kept_as_logs(tmp_path):
    header = {"recipe": {"model": {}, "data": {}, "train": {"steps": 60}}}
    write_run(tmp_path / "runs/mixed/phi-seed0", "phi", seed=0, steps=60, header=header)
    recipe = replace(Recipe.read(recipe_file("demo")), name="demo")
    kept = keep(recipe, tmp_path / "runs", tmp_path / "results")
    (run,) = find_runs(kept)
    assert run.path == tmp_path / "results/demo/mixed/phi-seed0/log.jsonl"
    assert not run.steps
    assert run.evals == read_run(tmp_path / "runs/mixed/phi-seed0").evals


def test_scores_of_sequences_are_what_a_monitor_sees_of_them():
    model = tiny("qwen3_moe")
    ids = tokens(4, 6, seed=1)
    data = [{"input_ids": ids[i], "domain": i % 2} for i in range(4)]
    scores, domains = sequence_scores(model, data, batch_size=3)
    assert domains.tolist() == [0, 1, 0, 1]
    with mb.attach(model, mb.NoBalancing()) as balancing:
        balancing.watch()
        model(input_ids=ids)
        _, loads = balancing.evaluation()
        soft = [soft for _, soft in loads.values()]
    np.testing.assert_allclose(scores.mean(axis=1), torch.stack(soft).numpy(), atol=1e-6)
