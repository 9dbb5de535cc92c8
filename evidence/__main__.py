"""Test the paper's claims: from committed results, or by running every recipe again.

    python -m evidence                  write docs/evidence.md from evidence/results
    python -m evidence --run [RECIPE …] train first what is not complete

Run it in a clone: recipes and results are files of the repository.
"""

import argparse
from pathlib import Path

from evidence import keep, write_page
from moebalance.lab.compare import compare
from moebalance.lab.recipe import Recipe

HERE = Path(__file__).parent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__)
    parser.add_argument("recipes", nargs="*", type=Path, help="with --run: only these recipes")
    parser.add_argument("--run", action="store_true", help="train first what is not complete")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder for runs")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="what is kept")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs/evidence.md")
    parser.add_argument("--workers", type=int, help="runs at the same time")
    given = parser.parse_args()
    for path in given.recipes or sorted((HERE / "recipes").glob("*.toml")) if given.run else ():
        recipe = Recipe.read(path)
        compare(recipe, given.out / recipe.name, workers=given.workers)
        print(f"Kept: {keep(recipe, given.out / recipe.name, given.results)}")
    for number, chapter in enumerate(write_page(given.results, given.page), start=1):
        print(f"{number}. {chapter.title}: {chapter.verdict.value}")
    print(f"Page: {given.page}")


if __name__ == "__main__":
    main()
