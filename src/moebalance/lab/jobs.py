"""What `train`, `finetune`, `compare` and `demo` do: run, show how far it is, report."""

import os
import shlex
import sys
from pathlib import Path

from moebalance.cleaning import for_path
from moebalance.lab.compare import compare, plan, run_name
from moebalance.lab.console import REPORT, console, counted, say, show, trackers
from moebalance.lab.identity import own_method, recipe_method
from moebalance.lab.progress import follow_jobs, follow_log
from moebalance.lab.recipe import FINAL, Recipe
from moebalance.runlog import LOG_NAME, find_runs, read_run
from moebalance.words.methods import split_outside_brackets


def run_one(
    recipe: Recipe,
    out: Path | None,
    method: str | None,
    seed: int,
    resume: bool,
    track: str | None,
    show_too: str | None = None,
) -> None:
    """Make one run in this process, and report.

    Args:
        recipe: what to train on what.
        out: folder of the run; by default in `runs/`, by the names of recipe, method and seed.
        method: words of the method; by default the recipe's own.
        seed: seed of fresh weights and data order.
        resume: go on from the last checkpoint.
        track: trackers to send rows to, with commas.
        show_too: what they show next to the scalars, with commas; None for everything.
    """
    from transformers.utils.logging import disable_progress_bar

    from moebalance.lab.train import train_run

    name = f"seed{seed}" if method is None else run_name(method, seed)
    folder = out or Path("runs") / for_path(recipe.name) / name
    if method is None:
        method, recipe = own_method(recipe)
    recipe_method(recipe, method)  # refuse a bad word before anything is loaded
    disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar is enough
    log, steps = folder / LOG_NAME, recipe.train.steps
    first = int(os.environ.get("RANK", 0)) == 0  # started by torchrun: the first process reports
    try:
        with (
            trackers(folder, track if first else None, show_too),
            follow_log(console, log, steps, method),
        ):
            train_run(
                recipe,
                method=method,
                seed=seed,
                batching=recipe.train.batching,
                folder=folder,
                resume=resume,
                save_model=True,
                cache_dir=folder / "cache",
            )
    except KeyboardInterrupt:
        if first:
            _say_how_to_go_on(saved=next(folder.glob("checkpoint-*"), None) is not None)
        raise
    if first:
        say(f"Model: {folder / FINAL}")
        show([read_run(log)], folder / REPORT)


def compare_all(
    recipe: Recipe,
    out: Path | None,
    *,
    methods: str | None = None,
    seeds: int | None = None,
    steps: int | None = None,
    workers: int | None = None,
    track: str | None = None,
    show_too: str | None = None,
) -> None:
    """Make all runs of a comparison, and report; if it ends early, report the runs so far.

    Args:
        recipe: what to compare on what.
        out: folder of the runs; by default in `runs/`, by the name of the recipe.
        methods: words of the methods, with commas; by default the recipe's own.
        seeds: how many seeds, from 0.
        steps: optimizer steps of a run.
        workers: runs at a time.
        track: trackers to send rows to, with commas.
        show_too: what they show next to the scalars, with commas; None for everything.
    """
    folder = out or Path("runs") / for_path(recipe.name)
    words = None if methods is None else split_outside_brackets(methods, ",")
    numbers = None if seeds is None else range(seeds)
    recipe = recipe.changed("compare", methods=words, seeds=numbers).changed("train", steps=steps)
    spec = recipe.compare
    jobs = len(plan(recipe, folder))
    say(
        f"{recipe.name}: {counted(jobs, 'run')} of {counted(recipe.train.steps, 'step')}, "
        f"{counted(len(spec.methods), 'method')} × {counted(len(spec.seeds), 'seed')} × "
        f"{counted(len(spec.batching), 'kind')} of micro-batch → {folder}"
    )
    try:
        with (
            trackers(folder, track, show_too),
            follow_jobs(console, jobs, recipe.train.steps) as progress,
        ):
            found = compare(recipe, folder, workers=workers, progress=progress)
    except (KeyboardInterrupt, RuntimeError) as error:
        if list(folder.rglob(LOG_NAME)):
            say("Stopped early; this is what there is.")
            show(find_runs(folder), folder / REPORT)
        if isinstance(error, KeyboardInterrupt):
            _say_how_to_go_on()
        raise
    show(found, folder / REPORT)


def _say_how_to_go_on(saved: bool | None = None) -> None:
    """Name the command; `saved` is whether a single run has a checkpoint to go on from."""
    words = sys.argv[1:]
    if saved and "--resume" not in words:
        words = [*words, "--resume"]
    again = f"moebalance {shlex.join(words)}"
    if saved is False:
        say(
            "Interrupted before a checkpoint was saved ([train] save_every says how often). Begin "
            f"again with: {again}"
        )
    else:
        say(f"Interrupted; what is on disk is whole. Go on with: {again}")
