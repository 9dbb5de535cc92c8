"""Compare methods under equal compute: every method × seed × batching is one run of its own.

Runs are independent processes of one or more threads each; what is complete is not run again, so an
interrupted comparison goes on where it stopped.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebalance.lab.recipe import FINAL, Recipe, refuse_frozen
from moebalance.runlog import LOG_NAME, Run, read_run
from moebalance.words.methods import build_method


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    method: str
    seed: int
    batching: str
    folder: Path

    @property
    def label(self) -> str:
        """What progress bars call it."""
        return f"{self.method} · seed {self.seed} · {self.batching}"


Progress = Callable[[Mapping[Job, int], Mapping[Job, str]], None]
"""Called every half second with the last step of each running job and the state of every job."""


def plan(recipe: Recipe, folder: Path) -> list[Job]:
    """List the runs of a comparison, seed by seed, so that early results pair.

    Raises:
        ValueError: an unknown method or option, before anything is run.
    """
    spec = recipe.compare
    for method in spec.methods:
        refuse_frozen(build_method(method, recipe.methods), recipe.lora)
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
        workers: processes at a time, by default one a core; threads are shared out evenly.
        progress: told how far things are.

    Raises:
        RuntimeError: a run failed; the others are finished first and stay.
    """
    # Tokenised once here, so that the workers only read it.
    from moebalance.lab.inputs import load_texts

    jobs = plan(recipe, folder)
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not is_complete(job, recipe)]
    states = {job: "waiting" if job in todo else "kept" for job in jobs}
    if todo:
        load_texts(recipe, cache_dir=cache)
        _run(recipe, todo, cache, workers or os.cpu_count() or 1, states, progress)
    failed = [job.label for job in jobs if states[job].startswith("failed")]
    if failed:
        reasons = "; ".join(f"{job.label}: {states[job]}" for job in jobs if job.label in failed)
        raise RuntimeError(f"{len(failed)} of {len(jobs)} runs failed. {reasons}")
    return [read_run(job.folder / LOG_NAME) for job in jobs]


def is_complete(job: Job, recipe: Recipe) -> bool:
    """Whether this very run has been made already, to its end."""
    path = job.folder / LOG_NAME
    if not path.is_file():
        return False
    try:
        run = read_run(path)
        then = Recipe.parse(run.header.get("recipe") or {}, source=str(path))
    except ValueError:
        return False
    if run.status != "complete" or not _same_start(run, recipe):
        return False
    if run.method_repr != repr(build_method(job.method, recipe.methods)):
        return False  # a default of the method was another then
    if recipe.compare.save_models and not (job.folder / FINAL).is_dir():
        return False
    return bool(_relevant(then, job) == _relevant(recipe, job))


def _run(
    recipe: Recipe,
    todo: list[Job],
    cache: Path,
    workers: int,
    states: dict[Job, str],
    progress: Progress | None,
) -> None:
    workers = min(workers, len(todo))
    threads = max(1, (os.cpu_count() or 1) // workers)
    # spawn: a forked child would share torch's thread pools in an undefined state.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(threads,),
    ) as pool:
        futures = {job: pool.submit(_work, recipe, job, cache) for job in todo}
        try:
            while any(not future.done() for future in futures.values()):
                _tell(futures, states, progress)
                time.sleep(0.5)
        except KeyboardInterrupt:
            # The workers got the signal as well; let each close its log, start no more.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        _tell(futures, states, progress)


def _tell(
    futures: Mapping[Job, Future[None]], states: dict[Job, str], progress: Progress | None
) -> None:
    steps = {}
    for job, future in futures.items():
        if not future.done():
            states[job] = "running" if future.running() else "waiting"
            if future.running():
                steps[job] = last_step(job.folder / LOG_NAME)
        elif states[job] in ("waiting", "running"):
            error = future.exception()
            states[job] = "done" if error is None else f"failed: {error}"
    if progress is not None:
        progress(steps, states)


def _start(threads: int) -> None:
    end_with_parent()
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # those of several workers would run into each other


def end_with_parent(grace: float = 30.0) -> None:
    """End this worker when its parent does, which a scheduler may kill alone.

    Args:
        grace: seconds that a run has to close its log after an interrupt like that of Ctrl-C.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    # An interrupt must come as KeyboardInterrupt, so that a run closes its log; a shell that starts
    # a job in the background has its children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch() -> None:
        parent.join()
        _ORPHANED.set()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(grace)
        os._exit(1)  # a worker without its pool would wait for work for ever

    threading.Thread(target=watch, daemon=True).start()


_ORPHANED = threading.Event()


def _work(recipe: Recipe, job: Job, cache: Path) -> None:
    from moebalance.lab.train import train_run

    if _ORPHANED.is_set():
        os._exit(1)  # a pool hands out one run more than it has workers
    train_run(
        recipe,
        method=job.method,
        seed=job.seed,
        batching=job.batching,
        folder=job.folder,
        save_model=recipe.compare.save_models,
        cache_dir=cache,
    )


def last_step(path: Path) -> int:
    """The last step in a log that is being written; reads its end only."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            found = re.findall(rb'"kind": ?"step", ?"step": ?(\d+)', file.read())
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0


def _same_start(run: Run, recipe: Recipe) -> bool:
    """Whether a run began with the weights that it would begin with now."""
    if recipe.checkpoint is None:
        return True
    # Imported here: reading a plan takes no model library.
    from moebalance.lab.checkpoints import checkpoint_folder, fingerprint
    from moebalance.lab.journal import logged_fingerprint

    return logged_fingerprint(run.header) == fingerprint(checkpoint_folder(recipe.checkpoint))


def _relevant(recipe: Recipe, job: Job) -> Any:
    """The parts of a recipe that a run depends on, through JSON as a log has them."""
    words = set(re.findall(r"[a-z-]+", job.method))
    methods = {word: table for word, table in recipe.methods.items() if word in words}
    table = recipe.as_dict()
    parts = [table[key] for key in ("model", "data", "old_data", "lora")]
    return json.loads(json.dumps([*parts, {**table["train"], "batching": ""}, methods]))


def run_name(method: str, seed: int) -> str:
    """Name of a run's folder.

    >>> run_name("phi+loss-free", 0)
    'phi+loss-free-seed0'
    """
    return f"{_slug(method)}-seed{seed}"


def _slug(method: str) -> str:
    """A folder name for a method; a digest keeps two that look alike apart."""
    plain = re.sub(r"[^a-z0-9.+-]+", "-", method.lower()).strip("-")
    if plain == method:
        return plain
    return f"{plain[:60]}-{hashlib.sha256(method.encode()).hexdigest()[:6]}"
