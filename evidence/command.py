"""What `python -m evidence` does with a study that has been run: keep what the page needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from evidence.population import plug_in_bias, simulated_scores
from evidence.results import Study, about, gather, write
from moebalance.lab.recipe import Recipe
from moebalance.runlog import find_runs

POPULATION = "population"


def keep(recipe: Recipe, folder: Path, results: Path) -> Path:
    """Thin a study's run logs into one file of the results.

    Args:
        recipe: of the study.
        folder: that its runs were written to.
        results: where the file goes, under the recipe's name.

    Returns:
        The file.

    Raises:
        FileNotFoundError: nothing was run there.
        ValueError: a run is not whole.
    """
    file = results / f"{recipe.name}.jsonl"
    if recipe.name == POPULATION:
        write(_population(recipe, folder), file)
    else:
        gather(recipe.name, folder, recipe.compare.methods, file)
    return file


def _population(recipe: Recipe, folder: Path) -> Study:
    """Bias of φ for simulated scores, and for those of the router that the recipe trained."""
    from evidence.network import trained_scores

    run = find_runs(folder)[0]
    scores, domains = trained_scores(recipe, run.path.parent)
    layers = [plug_in_bias(layer, domains) for layer in scores]
    trained = [
        {**rows[0], "excess": float(np.mean([row["excess"] for row in rows]))}
        for rows in zip(*layers, strict=True)
    ]
    simulated = plug_in_bias(*simulated_scores())
    return Study(POPULATION, {**about(run), "simulated": simulated, "trained": trained}, ())
