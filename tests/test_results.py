"""Committed results are those of the committed recipes, and the documentation is made from them."""

from pathlib import Path

import pytest

from evidence.chapter import sd
from evidence.chapters.length import evaluations
from evidence.chapters.recommended import CELLS, TESTS
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
    page = " ".join((ROOT / "docs/choosing.md").read_text("utf-8").split())
    assert f"its loss was {before[0]:.2f} before" in page


def test_what_a_bias_costs_in_fine_tuning_is_told_as_it_was_measured() -> None:
    found = load()["finetune"].less("loss-free", "phi", "loss")
    said = f"{found.mean:.3f} above φ on the new text ({found.mean - found.half:.3f} to "
    page = " ".join((ROOT / "docs/choosing.md").read_text("utf-8").split())
    assert f"{said}{found.mean + found.half:.3f})" in page


def test_the_page_of_results_has_the_numbers_of_the_runs() -> None:
    study = load()["rivals"]
    said = " ".join((ROOT / "docs/results.md").read_text("utf-8").split())
    ours = "phi+loss-free(scale='nats')"
    loss, spread = (sd(study, metric) for metric in ("loss", "maxvio"))
    assert f"standard deviation of {loss:.3f} nats in loss and {spread:.2f} in MaxVio" in said
    vio = {name: f"{study.mean(name, 'maxvio'):.2f}" for name in study.settings()}
    assert f"{study.mean('none', 'dead_experts'):.0f} of 64 experts are dead" in said
    assert f"MaxVio is {vio['none']}. With the recommended method MaxVio is {vio[ours]}." in said
    rest = [vio[name] for name in ("loss-free", "switch", "phi")]
    assert "It is {} with the loss-free bias, {} with Switch and {} with φ".format(*rest) in said
    for words, low, high in (
        ("{:.3f} nats per byte below no balancing (95 % interval {:.3f} to {:.3f})", ours, "none"),
        ("{:.3f} below φ alone ({:.3f} to {:.3f})", ours, "phi"),
        ("{:.3f} below φ of the hard load ({:.3f} to {:.3f})", ours, "phi(load='hard')"),
        ("It ends {:.3f} below no balancing ({:.3f} to {:.3f})", "phi", "none"),
        ("and {:.3f} above the loss-free bias ({:.3f} to {:.3f})", "loss-free", "phi"),
    ):
        found = study.less(high, low, "loss")
        assert words.format(found.mean, found.mean - found.half, found.mean + found.half) in said
    longer = load()["longer"]
    gaps = {s: longer.less("none", s, "loss").mean for s in longer.settings()}
    assert longer.seeds() == [0, 1]
    ends = gaps[ours], gaps["phi"]
    assert "method ends {:.3f} nats below no balancing, φ alone {:.3f}".format(*ends) in said
    assert f"{gaps['loss-free']:.3f}" == f"{gaps['switch']:.3f}"
    assert f"Switch {gaps['switch']:.3f}." in said
    assert {longer.less(s, "none", "loss").sign for s in longer.settings()} == {0}
    vios = evaluations(longer, "phi", "maxvio")
    assert f"MaxVio of φ falls from {vios[0]:.2f} to {vios[-1]:.2f}" in said
    means = [study.mean(s, "mi") for s in (ours, "loss-free", "phi", "switch", "none")]
    mi = (
        "{:.2f} nats with the recommended method, {:.2f} with loss-free, {:.2f} with φ, {:.2f} with"
    )
    assert mi.format(*means) in said
    first, second = sorted(vio, key=lambda name: study.mean(name, "maxvio"))[:2]
    assert (first, second) == ("phi+smebu(scale='nats')", ours)
    assert f"Only φ with SMEBU, at {vio[first]}, has a lower MaxVio here" in said
    rivals = set(vio) - {"none", ours}
    assert {study.less(ours, name, "loss").sign for name in rivals} == {0}
    assert "It is within seed noise of every other method" in said


def test_what_is_said_of_other_cells_is_what_they_measured() -> None:
    studies = load()
    said = " ".join((ROOT / "docs/results.md").read_text("utf-8").split())
    ours, before = "phi+loss-free(scale='nats')", "phi+smebu(scale='nats')"
    for words, setting, metric, names in (
        ("that chose it MaxVio is", ours, "maxvio", CELLS),
        ("in four test cells", ours, "maxvio", TESTS),
        ("the choice before, has", before, "maxvio", TESTS),
        ("On a sample of the training text MaxVio is", ours, "seen_maxvio", TESTS),
    ):
        *first, last = (f"{studies[name].mean(setting, metric):.2f}" for name in names)
        assert f"{words} {', '.join(first)} and {last}" in said
    cell = studies["recommend_e8"]
    losses = [cell.by_seed(setting, "loss").values() for setting in cell.settings()]
    assert f"differ by up to {max(max(each) - min(each) for each in losses):.2f} nats" in said


@pytest.mark.parametrize("name", RECIPES)
def test_tables_in_the_docs_are_made_from_the_logs(name: str, tmp_path: Path) -> None:
    made = write_markdown(find_runs(RESULTS / name), tmp_path / "t.md", f"Results: {name}")
    assert made.read_text("utf-8") == (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def test_the_figure_in_the_readme_is_made_from_the_logs(tmp_path: Path) -> None:
    made = write_figure(find_runs(RESULTS / "demo"), tmp_path / "f.svg")
    assert made.read_text("utf-8") == (ROOT / "docs" / "demo.svg").read_text("utf-8")
