"""How far runs are: bars in a terminal, lines in a job's log."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from moebalance.lab.console import Terminal
from moebalance.lab.workers import Job, last_step
from moebalance.runlog import read_run

EVERY_S = 180.0
"""Seconds between lines on runs that are not finished."""

Clock = Callable[[], float]


class Bars:
    """A bar for all runs of a comparison, and one for each that is running."""

    def __init__(self, console: Terminal, jobs: int, steps: int) -> None:
        self.bars, self.steps = _bars(console), steps
        self.overall = self.bars.add_task("all runs", total=jobs * steps)
        self.rows: dict[Job, TaskID] = {}

    def tell(self, running: Mapping[Job, int], states: Mapping[Job, str]) -> None:
        """Move the bars; called as `workers.Progress` says."""
        done = _ended(states) * self.steps + sum(running.values())
        self.bars.update(self.overall, completed=done)
        for job, step in running.items():
            if job not in self.rows:
                self.rows[job] = self.bars.add_task(job.label, total=self.steps)
            self.bars.update(self.rows[job], completed=step)
        for job in set(self.rows) - set(running):
            self.bars.remove_task(self.rows.pop(job))


class Lines:
    """A line for each run that ends, and one every few minutes: for a log, without a terminal."""

    def __init__(self, console: Terminal, steps: int, clock: Clock = time.monotonic) -> None:
        self.console, self.steps, self.clock = console, steps, clock
        self.began_s = self.told_s = clock()
        self.ended: set[Job] = set()

    def tell(self, running: Mapping[Job, int], states: Mapping[Job, str]) -> None:
        """Print what is due; called as `workers.Progress` says."""
        here = {job: state for job, state in states.items() if state != "kept"}
        left = self._time_left(_ended(here) * self.steps + sum(running.values()), len(here))
        count = f"{_ended(states)} of {len(states)}"
        for job, state in here.items():
            if state not in ("waiting", "running") and job not in self.ended:
                self.ended.add(job)
                self._say(f"{count}: {job.label}: {_outcome(job, state)}; {left}")
        if running and self.clock() - self.told_s >= EVERY_S:
            at = ", ".join(f"{job.label} at step {step}" for job, step in running.items())
            self._say(f"{count} runs ended; {at} of {self.steps}; {left}")

    def _time_left(self, done: int, runs: int) -> str:
        return time_left(done, runs * self.steps, self.clock() - self.began_s)

    def _say(self, text: str) -> None:
        self.told_s = self.clock()
        self.console.print(text, soft_wrap=True, highlight=False)


@contextmanager
def follow_jobs(
    console: Terminal, jobs: int, steps: int
) -> Iterator[Callable[[Mapping[Job, int], Mapping[Job, str]], None]]:
    """Show how far the runs of a comparison are; gives what is to be told."""
    if not console.is_terminal:
        yield Lines(console, steps).tell
        return
    shown = Bars(console, jobs, steps)
    with shown.bars:
        yield shown.tell


@contextmanager
def follow_log(console: Terminal, log: Path, steps: int, label: str) -> Iterator[None]:
    """Show how far a run in this process is, from its log."""
    stop, bars, began_s = threading.Event(), _bars(console), time.monotonic()
    task = bars.add_task(label, total=steps)

    def say() -> None:
        step = last_step(log)
        if console.is_terminal:
            bars.update(task, completed=step)
        else:
            left = time_left(step, steps, time.monotonic() - began_s)
            line = f"{label}: step {step} of {steps}; {left}"
            console.print(line, soft_wrap=True, highlight=False)

    def watch() -> None:
        while not stop.wait(0.5 if console.is_terminal else EVERY_S):
            say()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with bars if console.is_terminal else nullcontext():
            yield
    finally:
        stop.set()
        thread.join()
        if console.is_terminal:
            say()


def time_left(done: int, total: int, elapsed_s: float) -> str:
    """How long the rest takes, if it goes on as it went.

    >>> time_left(100, 400, 60.0), time_left(1, 101, 100.0), time_left(0, 400, 60.0)
    ('about 3 min left', 'about 2 h 47 min left', 'time left unknown')
    >>> time_left(390, 400, 60.0), time_left(400, 400, 60.0)
    ('under a minute left', 'nothing left')
    """
    if not done:
        return "time left unknown"
    if done >= total:
        return "nothing left"
    minutes = round((total - done) * elapsed_s / done / 60)
    if not minutes:
        return "under a minute left"
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"about {hours}{minutes % 60} min left"


def _outcome(job: Job, state: str) -> str:
    if state != "done":
        return state
    found = read_run(job.log).evals[-1]
    return f"loss {found['loss']:.3f}, MaxVio {found['maxvio']:.2f}"


def _ended(states: Mapping[Job, str]) -> int:
    return sum(state not in ("waiting", "running") for state in states.values())


def _bars(console: Terminal) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)
