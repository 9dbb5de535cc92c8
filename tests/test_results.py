"""Committed results are those of the committed recipes, and the documentation is made from them."""

import json
from pathlib import Path

import pytest

from moebalance.experiments.compare import plan
from moebalance.experiments.recipe import Recipe
from moebalance.report import write_figure, write_markdown
from moebalance.runlog import find_runs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = {
    "demo": ROOT / "src" / "moebalance" / "recipes" / "demo.toml",
    "defaults": ROOT / "recipes" / "defaults.toml",
    "longer": ROOT / "recipes" / "longer.toml",
}


@pytest.mark.parametrize("name", RECIPES)
def test_results_are_of_the_recipe_as_it_stands(name: str) -> None:
    recipe = Recipe.read(RECIPES[name])
    runs = find_runs(RESULTS / name)
    now = json.loads(json.dumps(recipe.as_dict()))
    for run in runs:
        assert {key: run.header["recipe"][key] for key in ("model", "data", "train")} == {
            key: now[key] for key in ("model", "data", "train")
        }
        assert run.status == "complete"
    planned = {(job.batching, job.folder.name) for job in plan(recipe, Path("anywhere"))}
    assert {(run.batching, run.path.parent.name) for run in runs} == planned


@pytest.mark.parametrize("name", RECIPES)
def test_tables_in_the_docs_are_made_from_the_logs(name: str, tmp_path: Path) -> None:
    made = write_markdown(find_runs(RESULTS / name), tmp_path / "t.md", f"Results: {name}")
    assert made.read_text("utf-8") == (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def test_the_figure_in_the_readme_is_made_from_the_logs(tmp_path: Path) -> None:
    made = write_figure(find_runs(RESULTS / "demo"), tmp_path / "f.svg")
    assert made.read_text("utf-8") == (ROOT / "docs" / "demo.svg").read_text("utf-8")
