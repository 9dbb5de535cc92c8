"""The torchrun example: two processes train what one does, and it resumes as if never stopped."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

EXAMPLE = Path(__file__).parents[1] / "examples" / "torchrun.py"
STEPS = 20

Train = Callable[[int, Path], None]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """The example's training, in this process alone."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield runpy.run_path(str(EXAMPLE))["train"]
    dist.destroy_process_group()


def saved(path: Path) -> dict[str, Any]:
    """A checkpoint, without the number of batches in its last step."""
    found = torch.load(path)
    for name in [name for name in found["model"] if name.endswith("last_step")]:
        assert found["model"].pop(name)[0] == 8 * 64
    return {"model": found["model"], "steps": found["balancing"]["steps"]}


def test_two_processes_end_where_one_does(tmp_path: Path, train: Train) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(EXAMPLE), str(STEPS), str(two)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    assert [(row[1], row[-1]) for row in rows] == [("10", "512"), ("20", "512")]
    train(STEPS, one)
    torch.testing.assert_close(saved(two), saved(one), rtol=1e-3, atol=1e-4)


def test_a_run_that_was_stopped_ends_where_one_that_was_not_does(
    tmp_path: Path, train: Train
) -> None:
    whole, stopped = tmp_path / "whole.pt", tmp_path / "stopped.pt"
    train(STEPS, whole)
    train(STEPS // 2, stopped)
    assert saved(stopped)["steps"] == STEPS // 2
    train(STEPS, stopped)
    torch.testing.assert_close(saved(stopped), saved(whole), rtol=0, atol=0)


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
