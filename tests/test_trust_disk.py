"""Half-written and crowded: full disks, cut files, two processes in a folder."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

import moebalance as mb
from moebalance.core.layer import LayerBalance
from moebalance.files import write_text, writing
from moebalance.integrations.huggingface.contents import save_parts
from moebalance.integrations.huggingface.sharded import PARTS
from moebalance.lab.checkpoints import last_whole_checkpoint
from moebalance.lab.compare import compare
from moebalance.lab.lock import LOCK, alone_in
from moebalance.lab.recipe import Recipe
from moebalance.lab.train import train_run
from moebalance.report.canvas import panels
from moebalance.report.canvas import save as save_figure
from moebalance.runlog import LOG_NAME, RunLog, read_run

RECIPE = {
    "name": "small",
    "model": {
        "architecture": "olmoe",
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
    },
    "data": {"seq_len": 32},
    "train": {"steps": 4, "batch_size": 2, "eval_sequences": 4, "save_every": 2},
}


def recipe(folder: Path) -> Recipe:
    for name in ("a", "b"):
        (folder / "text" / name).mkdir(parents=True, exist_ok=True)
        for part in range(4):
            (folder / "text" / name / f"{part}.txt").write_text(f"{name} {part} " * 200)
    data = {**RECIPE["data"], "source": str(folder / "text")}
    return Recipe.parse({**RECIPE, "data": data}, source="small.toml")


def train(folder: Path, run: str, **options: bool) -> Path:
    given = {"method": "loss-free", "seed": 0, "batching": "mixed", **options}
    return train_run(recipe(folder), folder=folder / run, **given)


# --- Checkpoints that were cut off ----------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of its steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    return train(folder, "run").parent


def distributed(folder: Path, step: int) -> Path:
    """What every checkpoint of a sharded run has."""
    folder = folder / f"checkpoint-{step}"
    save_distributed({"w": torch.zeros(9)}, checkpoint_id=folder / PARTS)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    numbers = {"python": random.getstate(), "numpy": np.random.get_state()}
    torch.save({**numbers, "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    return folder


WHOLE = (
    *("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    *("config.json", "model.safetensors"),
)


@pytest.mark.survives(
    "Killed and resumed",
    "Any file of the last checkpoint is cut off, empty, missing or zeros",
    "goes on: from the checkpoint before",
)
@pytest.mark.parametrize("name", [*WHOLE, mb.huggingface.STATE_FILE])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "zeros"])
def test_a_checkpoint_with_a_half_written_file_falls_back_to_the_one_before(
    saved: Path, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    before, last = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    assert last_whole_checkpoint(tmp_path) == last
    whole = (last / name).read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "empty": b"", "zeros": bytes(len(whole))}
    if damage == "missing":
        (last / name).unlink()
    else:
        (last / name).write_bytes(broken[damage])
    assert last_whole_checkpoint(tmp_path) == before
    assert str(last) in caplog.text
    assert name in caplog.text


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", ["rng_state.pth", "trainer_state.json", f"{PARTS}/.metadata"])
def test_a_distributed_checkpoint_with_a_half_written_file_falls_back_too(
    tmp_path: Path, name: str
) -> None:
    before, last = distributed(tmp_path, 2), distributed(tmp_path, 4)
    assert last_whole_checkpoint(tmp_path) == last
    whole = (last / name).read_bytes()
    (last / name).write_bytes(whole[: len(whole) // 2])
    assert last_whole_checkpoint(tmp_path) == before


# --- Full disks -----------------------------------------------------------------------------------


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """Files of this process may have so many bytes: what writes more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _log(path: Path) -> None:
    with RunLog(path) as log:
        log.write("header", method="phi", note="x" * 9999)


def _state(path: Path) -> None:
    method = mb.LossFree()
    layers = {str(i): LayerBalance(method, 256) for i in range(9)}
    mb.huggingface.save(mb.Balancing(method, layers), path.parent)


def _torch(path: Path) -> None:
    with writing(path):
        torch.save({"x": torch.zeros(9999)}, path)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "text": ("page.html", lambda path: write_text(path, "x" * 9999)),
    "log": (LOG_NAME, _log),
    "state": (mb.huggingface.STATE_FILE, _state),
    "torch": ("optimizer.pt", _torch),
    "svg": ("figure.svg", lambda path: save_figure(panels()[0], path)),
    "png": ("figure.png", lambda path: save_figure(panels()[0], path)),
    "pdf": ("figure.pdf", lambda path: save_figure(panels()[0], path)),
    "parts": ("distributed", lambda path: save_parts({"w": torch.zeros(9999)}, path)),
}


@pytest.mark.survives(
    "Full disks and crowded folders",
    "No room for a report, figure, log, state or checkpoint",
    "error: with the path and the cause",
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_told_with_the_path_and_the_cause(tmp_path: Path, kind: str) -> None:
    name, write = WRITERS[kind]
    with pytest.raises(OSError, match="File too large") as told, full_beyond(2000):
        write(tmp_path / name)
    assert told.value.filename == str(tmp_path / name)
    assert "inline_container" not in str(told.value)
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left <= {LOG_NAME, "optimizer.pt", "moebalance.partial"}  # no half of another file stays


def test_no_space_left_is_told_as_such_whoever_writes(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / LOG_NAME).symlink_to(full)
    with pytest.raises(OSError, match="No space left on device") as told:
        _log(tmp_path / LOG_NAME)
    assert told.value.filename == str(tmp_path / LOG_NAME)
    assert told.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left on device"):
        write_text(full, "x")


def test_what_is_no_failure_to_write_is_left_as_it_is(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), KeyError("x"), OSError(errno.EACCES, "no", "y")):
        with pytest.raises(type(error)) as same, writing(tmp_path):
            raise error
        assert same.value is error


@pytest.mark.survives(
    "Full disks and crowded folders",
    "No room for a checkpoint, and then there is room",
    "goes on: with `--resume`",
)
def test_a_run_on_a_full_disk_names_the_checkpoint_and_goes_on_once_there_is_room(
    tmp_path: Path,
) -> None:
    with pytest.raises(OSError, match="File too large") as told, full_beyond(20_000):
        train(tmp_path, "run")
    assert "checkpoint-2" in str(told.value.filename)
    assert read_run(tmp_path / "run").status == "failed"
    assert last_whole_checkpoint(tmp_path / "run") is None
    train(tmp_path, "run", resume=True)
    assert read_run(tmp_path / "run").status == "complete"


# --- Two processes in one folder ------------------------------------------------------------------

HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(f"process {os.getpid()} on here")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process_in(folder: Path) -> Iterator[subprocess.Popen[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-S", "-c", HOLD, str(folder / LOCK)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.survives(
    "Full disks and crowded folders",
    "A second process in the folder of a run",
    "refused: with the folder and the first process",
)
def test_a_second_process_in_a_run_folder_is_refused_with_folder_and_process(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    with another_process_in(folder) as other:
        for begin in (
            lambda: train(tmp_path, "run"),
            lambda: train(tmp_path, "run", resume=True),
            lambda: compare(recipe(tmp_path), folder),
        ):
            with pytest.raises(ValueError, match=f"in use by process {other.pid} on here") as told:
                begin()
            assert str(folder) in str(told.value)
        assert sorted(path.name for path in folder.iterdir()) == [LOCK]
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        with alone_in(folder):  # a killed process lets go
            assert f"process {os.getpid()} on " in (folder / LOCK).read_text()


def test_a_folder_is_free_again_after_a_run_and_after_an_error(tmp_path: Path) -> None:
    def twice() -> None:
        with (
            alone_in(tmp_path),
            pytest.raises(ValueError, match="in use by"),
            alone_in(tmp_path),
        ):
            pass

    def fails() -> None:
        with alone_in(tmp_path):
            raise RuntimeError("mine")

    twice()
    with pytest.raises(RuntimeError, match="mine"):
        fails()
    with alone_in(tmp_path):
        pass
