"""From run logs to results: what the evidence keeps of a study.

A run log holds hundreds of kB, most of it a row for each step. Kept of it are the scalars of every
evaluation, how far its loads are from what the study aims at, and the training curves as means over
windows of steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from evidence.aims import Aim, aim_of
from evidence.population import plug_in_bias, simulated_scores, trained_scores
from evidence.study import Result, Study, read, write
from moebalance.lab.compare import run_name
from moebalance.lab.recipe import Recipe
from moebalance.report.diagnosis.oscillation import Swing, swing
from moebalance.report.estimates import finite, is_whole
from moebalance.runlog import Row, Run, archive, find_runs

HERE = Path(__file__).parent
RECIPES, RESULTS = HERE / "recipes", HERE / "results"
TABLES = ("demo",)
"""Studies whose run logs are kept themselves, because a page in docs/ is the report of them."""
CURVES = ("loss", "maxvio", "gini", "soft_maxvio", "rate", "multiplier")
_POINTS = 40
_TOP_PAIRS = 0.05


def recipe_file(name: str) -> Path:
    """The recipe of a study; the demo's is part of the package.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(str(files("moebalance.lab"))) / "recipes" if name == "demo" else RECIPES
    file = folder / f"{name}.toml"
    if not file.is_file():
        known = ", ".join(["demo", *sorted(path.stem for path in RECIPES.glob("*.toml"))])
        raise FileNotFoundError(f"No recipe {name!r}. There are {known}.")
    return file


def load(results: Path = RESULTS) -> dict[str, Study]:
    """Every study that is kept, by name."""
    found = {file.stem: read(file) for file in sorted(results.glob("*.jsonl"))}
    for name in TABLES:
        if (results / name).is_dir():
            recipe = Recipe.read(recipe_file(name))
            found[name] = gather(name, results / name, recipe.compare.methods)
    return found


def keep(recipe: Recipe, folder: Path, results: Path = RESULTS) -> Path:
    """Keep the runs of a recipe, under its name.

    Args:
        recipe: of the study.
        folder: that `compare` wrote its runs to.
        results: folder of all results.

    Returns:
        The file, or the folder of run logs.

    Raises:
        FileNotFoundError: nothing was run there.
        ValueError: a run is not whole: a study is kept as a whole or not at all.
    """
    if recipe.name in TABLES:
        for run in find_runs(folder):
            archive(run, results / recipe.name / run.path.parent.relative_to(folder))
        return results / recipe.name
    if recipe.name == "population":
        study = _population(recipe, folder)
    else:
        study = gather(recipe.name, folder, recipe.compare.methods)
    file = results / f"{recipe.name}.jsonl"
    write(study, file)
    return file


def gather(name: str, folder: Path, settings: Iterable[str]) -> Study:
    """Thin the run logs of a study.

    Args:
        name: of the study, its recipe's.
        folder: that `compare` wrote to.
        settings: the recipe's methods, in their order.

    Raises:
        FileNotFoundError: there are no logs.
        ValueError: a run is not whole.
    """
    order = list(dict.fromkeys(settings))
    runs, aim = find_runs(folder), aim_of(order)
    named = {run_name(s, r.seed or 0): s for s in order for r in runs}
    # Other folders are of an earlier version of the recipe.
    ours = [run for run in runs if run.path.parent.name in named]
    if not ours:
        raise FileNotFoundError(f"{folder} has no run of {name} with one of {order}.")
    for run in ours:
        if not is_whole(run):
            raise ValueError(f"{run.path} is not whole ({run.status}): run the study again first.")
    found = [thin(run, named[run.path.parent.name], aim) for run in ours]
    found.sort(key=lambda r: (r.batching, order.index(r.setting), r.seed))
    commits = sorted({str(run.header["commit"]) for run in ours})
    return Study(name, {**_about(ours[0]), "commits": commits}, tuple(found))


def thin(run: Run, setting: str, aim: Aim | None = None) -> Result:
    """Keep of a run what the evidence needs."""
    last, aim = run.evals[-1], aim or Aim()
    evals = [_scalars(row) | aim.judge(row["load"]) for row in run.evals]
    evals[-1] |= _coactivation(last)
    return Result(
        method=run.method,
        setting=setting,
        seed=run.seed or 0,
        batching=run.batching,
        evals=tuple(evals),
        curve=_windows(run.steps),
        swing=_swings(run),
    )


def _population(recipe: Recipe, folder: Path) -> Study:
    """Bias of φ for simulated scores, and for the scores of the router that the recipe trained."""
    run = find_runs(folder)[0]
    scores, domains = trained_scores(recipe, run.path.parent)
    layers = [plug_in_bias(layer, domains) for layer in scores]
    trained = [
        {**rows[0], "excess": float(np.mean([row["excess"] for row in rows]))}
        for rows in zip(*layers, strict=True)
    ]
    simulated = plug_in_bias(*simulated_scores())
    about = {**_about(run), "commits": [str(run.header["commit"])]}
    return Study(recipe.name, {**about, "simulated": simulated, "trained": trained}, ())


def _about(run: Run) -> dict[str, Any]:
    """What all runs of a study have in common: model, data, training, versions."""
    recipe = run.header["recipe"]
    kept = {key: recipe[key] for key in ("model", "data", "train")}
    keys = ("steps", "versions", "model", "data")
    return {"recipe": kept, **{key: run.header[key] for key in keys}}


def _scalars(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "tokens"}


def _coactivation(row: Row) -> Mapping[str, float]:
    """Mean lift of the pairs of experts that most often serve a token together."""
    tops = []
    for lifts in row.get("coactivation", []):
        count = max(1, round(_TOP_PAIRS * len(lifts)))
        tops.append(statistics.fmean(sorted(lifts)[-count:]))
    return {"top_pair_lift": statistics.fmean(tops)} if tops else {}


def _windows(steps: Sequence[Row]) -> dict[str, list[float]]:
    width = max(1, len(steps) // _POINTS)
    parts = [steps[i : i + width] for i in range(0, len(steps) - width + 1, width)]
    curve: dict[str, list[float]] = {"step": [part[-1]["step"] for part in parts]}
    for name in CURVES:
        values = [[v for row in part if (v := finite(row, name)) is not None] for part in parts]
        if parts and all(values):
            # Four digits are what a picture can show.
            curve[name] = [float(f"{statistics.fmean(part):.4g}") for part in values]
    return curve


def _swings(run: Run) -> tuple[Swing, ...] | None:
    late = run.snapshots[len(run.snapshots) // 2 :]
    if len(run.snapshots) < run.last_step or len(late) < 2:
        return None
    layers = len(late[0]["load"])
    return tuple(swing([row["load"][layer] for row in late]) for layer in range(layers))
