"""Runs as processes of their own: how many at a time, how far they are, and how they end."""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moebalance.lab.recipe import Recipe
from moebalance.runlog import LOG_NAME


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    method: str
    seed: int
    batching: str
    folder: Path

    @property
    def label(self) -> str:
        """The name of the run in progress bars and errors."""
        return f"{self.method} · seed {self.seed} · {self.batching}"

    @property
    def log(self) -> Path:
        """The path of its run log."""
        return self.folder / LOG_NAME


Progress = Callable[[Mapping[Job, int], Mapping[Job, str]], None]
"""Called every half second with the last step of each running job and the state of every job:
`waiting`, `running`, `done`, `kept` from earlier, or `failed: …`."""


def run_jobs(
    recipe: Recipe,
    jobs: Sequence[Job],
    cache: Path,
    workers: int | None,
    states: dict[Job, str],
    progress: Progress | None,
) -> None:
    """Run jobs in processes until all have ended; `states` says how.

    Args:
        recipe: what to train on what.
        jobs: one or more.
        cache: folder with the tokenised text.
        workers: processes at a time; None for as many as the cores allow.
        states: state of each job, kept up to date.
        progress: told every half second how far things are.
    """
    workers, threads = share_cores(len(jobs), workers)
    # spawn: a forked child would share torch's thread pools in an undefined state.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(threads,),
    ) as pool:
        futures = {job: pool.submit(_work, recipe, job, cache) for job in jobs}
        try:
            while any(not future.done() for future in futures.values()):
                _tell(futures, states, progress)
                time.sleep(0.5)
        except KeyboardInterrupt:
            # The workers got the signal too; let each close its log, start no more.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        _tell(futures, states, progress)


def share_cores(runs: int, workers: int | None = None) -> tuple[int, int]:
    """Processes at a time, and threads of each.

    They fill the cores that this process may use (its CPU affinity). OMP_NUM_THREADS, if set, is
    the number of threads of each process.

    Args:
        runs: how many there are.
        workers: processes at a time; None for as many as the cores allow.
    """
    cores = _usable_cores()
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    threads = int(asked) if asked.isdigit() and int(asked) > 0 else None
    workers = min(runs, workers or max(1, cores // (threads or 1)))
    return workers, threads or max(1, cores // workers)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tell(
    futures: Mapping[Job, Future[None]], states: dict[Job, str], progress: Progress | None
) -> None:
    steps = {}
    for job, future in futures.items():
        if not future.done():
            states[job] = "running" if future.running() else "waiting"
            if future.running():
                steps[job] = last_step(job.log)
        elif states[job] in ("waiting", "running"):
            error = future.exception()
            states[job] = "done" if error is None else f"failed: {error}"
    if progress is not None:
        progress(steps, states)


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


def _start(threads: int) -> None:
    end_with_parent()
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # bars of several workers would mix


def end_with_parent(grace: float = 30.0) -> None:
    """End this worker when its parent ends, which a scheduler may kill alone.

    Args:
        grace: seconds that a run has to close its log after an interrupt like Ctrl-C.
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
