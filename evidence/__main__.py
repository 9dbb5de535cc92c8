"""Hold claims against runs: from committed results, or after training what is missing.

    python -m evidence                  write the pages of numbers in docs/ from evidence/results
    python -m evidence --run            train first the recipes that have no results
    python -m evidence --run rate shift train these, whether they have results or not

A run that is complete in runs/evidence is not trained again. Run it in a clone of the repository.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from evidence.keep import HERE, RECIPES, RESULTS, keep, recipe_file
from evidence.pages import write_all
from moebalance.lab.compare import compare
from moebalance.lab.recipe import Recipe

ROOT = HERE.parent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", nargs="*", metavar="RECIPE", help="names of recipes to train")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder for runs")
    parser.add_argument("--workers", type=int, help="runs at the same time")
    given = parser.parse_args()
    try:
        refuse_without_clone(ROOT)
        if given.run is not None:
            for name in given.run or missing(RESULTS):
                train(name, given.out, given.workers)
        found = write_all(RESULTS, ROOT / "benchmarks/results", ROOT / "docs")
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"Error: {error}")
    for number, (claim, finding) in enumerate(found, start=1):
        print(f"{number}. {claim.title}: {finding.verdict.value}")
    if names := missing(RESULTS):
        print(f"No results yet of {', '.join(names)}; --run trains them.")
    print(f"Pages: {ROOT / 'docs'}")


def refuse_without_clone(root: Path) -> None:
    """Say what is missing if this is not a clone of the repository.

    Raises:
        FileNotFoundError: a folder is not there, or holds no results.
    """
    folders = ("evidence/recipes", "evidence/results", "benchmarks/results", "docs")
    absent = [name for name in folders if not any((root / name).glob("*"))]
    if absent:
        raise FileNotFoundError(
            f"{root} has no {' and no '.join(absent)}. Recipes, results and pages are files of "
            "moebalance's repository: run `python -m evidence` in a clone of it."
        )


def missing(results: Path) -> list[str]:
    """The recipes without results."""
    names = sorted(file.stem for file in RECIPES.glob("*.toml"))
    return [n for n in names if not any((results / kept).exists() for kept in (n, f"{n}.jsonl"))]


def train(name: str, out: Path, workers: int | None = None) -> None:
    """Train all runs of a recipe, and keep them.

    Raises:
        FileNotFoundError: no such recipe.
        RuntimeError: a run failed.
    """
    recipe = Recipe.read(recipe_file(name))
    print(f"{name}: {len(recipe.compare.methods)} settings, seeds {recipe.compare.seeds}")
    if recipe.checkpoint is not None and not Path(recipe.checkpoint).is_dir():
        start = RECIPES / "checkpoints" / f"{Path(recipe.checkpoint).parts[1]}.toml"
        command = [sys.executable, "-m", "moebalance", "train", str(start)]
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError(f"{start} could not be trained, and {name} starts from its model.")
    compare(recipe, out / recipe.name, workers=workers)
    print(f"Kept: {keep(recipe, out / recipe.name)}")


if __name__ == "__main__":
    main()
