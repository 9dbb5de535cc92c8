"""Committed results are those of the committed recipes, and the documentation is made from them."""

from pathlib import Path

import pytest

from evidence.keep import RESULTS, TABLES, load, recipe_file
from moebalance.lab.compare import plan
from moebalance.lab.recipe import Recipe
from moebalance.report import write_figure, write_markdown
from moebalance.runlog import find_runs

ROOT = Path(__file__).parents[1]
RECIPES = {name: recipe_file(name) for name in TABLES}


@pytest.mark.parametrize("name", RECIPES)
def test_results_are_of_the_recipe_as_it_stands(name: str) -> None:
    recipe = Recipe.read(RECIPES[name])
    runs = find_runs(RESULTS / name)
    for run in runs:
        # A log of an earlier version lacks the keys that came later: there they have no effect.
        then = Recipe.parse(run.header["recipe"], source=str(run.path))
        for key in ("model", "data", "old_data", "lora", "train"):
            assert getattr(then, key) == getattr(recipe, key)
        assert run.status == "complete"
    planned = {(job.batching, job.folder.name) for job in plan(recipe, Path("anywhere"))}
    assert {(run.batching, run.path.parent.name) for run in runs} == planned


def test_every_fine_tuning_starts_from_the_same_model() -> None:
    before = [run.evals[0]["old_loss"] for run in load()["finetune"].results]
    assert before == pytest.approx([before[0]] * len(before), abs=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_tables_in_the_docs_are_made_from_the_logs(name: str, tmp_path: Path) -> None:
    made = write_markdown(find_runs(RESULTS / name), tmp_path / "t.md", f"Results: {name}")
    assert made.read_text("utf-8") == (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def test_the_figure_in_the_readme_is_made_from_the_logs(tmp_path: Path) -> None:
    made = write_figure(find_runs(RESULTS / "demo"), tmp_path / "f.svg")
    assert made.read_text("utf-8") == (ROOT / "docs" / "demo.svg").read_text("utf-8")
