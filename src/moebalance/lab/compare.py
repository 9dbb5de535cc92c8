"""Compare methods under equal compute: every method × seed × batching is one run of its own.

A run that is complete is not run again, so an interrupted comparison goes on where it stopped.
"""

import hashlib
import re
from pathlib import Path

from moebalance.lab.identity import differences, identify, own_method, recipe_method
from moebalance.lab.lock import alone_in
from moebalance.lab.recipe import FINAL, Recipe
from moebalance.lab.workers import Job, Progress, run_jobs
from moebalance.runlog import Run, read_run
from moebalance.words.methods import build_method


def plan(recipe: Recipe, folder: Path) -> list[Job]:
    """List the runs of a comparison, seed by seed, so that early results pair.

    Raises:
        TypeError, ValueError: an unknown method or option, before anything is run.
    """
    spec = recipe.compare
    words, trained = own_method(recipe)
    build_method(words, trained.methods)  # not run here, but a typing error in it is one
    for method in spec.methods:
        recipe_method(recipe, method)
    return [
        Job(method, seed, batching, folder / batching / run_name(method, seed))
        for seed in spec.seeds
        for batching in spec.batching
        for method in spec.methods
    ]


def compare(
    recipe: Recipe, folder: Path, *, workers: int | None = None, progress: Progress | None = None
) -> list[Run]:
    """Run a comparison and return its run logs.

    Args:
        recipe: what to compare on what.
        folder: where the runs go; complete runs of the same recipe there are kept.
        workers: processes at a time; by default as many as CPU affinity and OMP_NUM_THREADS allow.
        progress: told every half second how far things are.

    Raises:
        RuntimeError: a run failed; the others are finished first and stay.
        ValueError: another process is at work in the folder.
    """
    with alone_in(folder):
        return _compare(recipe, folder, workers, progress)


def _compare(
    recipe: Recipe, folder: Path, workers: int | None, progress: Progress | None
) -> list[Run]:
    # Imported here: reading a plan takes no model library.
    from moebalance.lab.inputs import load_texts

    jobs = plan(recipe, folder)
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not is_complete(job, recipe)]
    states = {job: "waiting" if job in todo else "kept" for job in jobs}
    if todo:
        load_texts(recipe, cache_dir=cache)  # tokenised once, so that the workers only read it
        run_jobs(recipe, todo, cache, workers, states, progress)
    failed = [f"{job.label}: {state}" for job, state in states.items() if "failed" in state]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed. {'; '.join(failed)}")
    return [read_run(job.log) for job in jobs]


def is_complete(job: Job, recipe: Recipe) -> bool:
    """Whether this very run has been made already, to its end."""
    if not job.log.is_file():
        return False
    try:
        run = read_run(job.log)
        changed = differences(run, recipe, identify(recipe, job.method, job.seed, job.batching))
    except ValueError:
        return False
    if run.status != "complete" or changed:
        return False
    return not recipe.compare.save_models or (job.folder / FINAL).is_dir()


def run_name(method: str, seed: int) -> str:
    """Name of the folder of a run; a digest tells apart two methods that look alike in it.

    >>> run_name("phi+loss-free", 0)
    'phi+loss-free-seed0'
    """
    name = re.sub(r"[^a-z0-9.+-]+", "-", method.lower()).strip("-")
    if name != method:
        name = f"{name[:60]}-{hashlib.sha256(method.encode()).hexdigest()[:6]}"
    return f"{name}-seed{seed}"
