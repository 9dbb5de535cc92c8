"""A comparison that is killed leaves no worker behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

_PARENT = """
import multiprocessing, sys, time
from orphan import swallow

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=swallow, args=(sys.argv[1],))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.survives(
    "Killed and resumed",
    "The process that started a comparison is killed",
    "error: its workers end too",
)
def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """One that is killed cannot tell its workers; without it they would train on, unseen."""
    script, told = tmp_path / "parent.py", tmp_path / "told"
    script.write_text(_PARENT)
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, str(script), str(told)],
        env={**os.environ, **path},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        wait_for(lambda: told.is_file() and told.read_text() == "running")
        parent.kill()
    wait_for(lambda: told.read_text() == "interrupted")
    wait_for(lambda: not alive(worker))  # even one that has swallowed the interrupt


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
