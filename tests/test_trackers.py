"""Trackers: TensorBoard's files read back, and what the others are told, by the log's own rows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from moebalance.lab.cli import app
from moebalance.lab.trackers import following, scalars, track
from moebalance.runlog import RunLog, read_run
from synthetic_runs import write_run


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.fixture
def told(monkeypatch) -> list[tuple[Any, ...]]:
    """W&B and trackio by their documented interface: init, and log and finish of its run."""
    calls: list[tuple[Any, ...]] = []

    def package(name: str) -> ModuleType:
        module = ModuleType(name)

        def init(**options: Any) -> SimpleNamespace:
            calls.append((name, "init", options))
            return SimpleNamespace(
                log=lambda data, step=None: calls.append((name, "log", data, step)),
                finish=lambda exit_code=None: calls.append((name, "finish", exit_code)),
            )

        module.init = init
        return module

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, package(name))
    return calls


def test_tensorboard_reads_back_what_the_log_says(tmp_path):
    run = read_run(write_run(tmp_path / "phi-seed0", "phi", steps=20, snapshot_every=10))
    track(run.path, ["tensorboard"], folder=tmp_path / "out")
    found = events(tmp_path / "out" / "tensorboard" / "mixed-phi-seed0")
    assert found["moe/maxvio"] == [(r["step"], pytest.approx(r["maxvio"])) for r in run.steps]
    assert found["train/loss"] == [(r["step"], pytest.approx(r["loss"])) for r in run.steps]
    assert found["eval/loss"] == [(20, pytest.approx(run.evals[0]["loss"]))]
    first = run.snapshots[0]["load"][0]
    assert found["moe/layer_0/maxvio"][0] == (
        10,
        pytest.approx(max(first) * len(first) / sum(first) - 1),
    )


def test_every_tracker_is_told_the_same(tmp_path, told):
    path = write_run(tmp_path / "phi-seed0", "phi", steps=5, header={"name": "demo"})
    track(path, ["wandb", "trackio"])
    logs = {
        name: [
            (data, step)
            for who, what, *rest in told
            if (who, what) == (name, "log")
            for data, step in [rest]
        ]
        for name in ("wandb", "trackio")
    }
    assert logs["wandb"] == logs["trackio"]
    steps = [step for _, step in logs["wandb"]]
    assert steps == sorted(steps)
    (wandb, trackio) = (options for _, what, options, *_ in told if what == "init")
    assert wandb["project"] == trackio["project"] == "demo"
    assert wandb["name"] == trackio["name"] == "mixed-phi-seed0"
    assert wandb["config"]["method"] == "phi"
    assert ("wandb", "finish", 0) in told


def test_a_run_cut_short_is_not_called_a_success(tmp_path, told):
    track(write_run(tmp_path / "run", "phi", steps=9, stop=4), ["wandb"])
    assert told[-1] == ("wandb", "finish", 1)


def test_rows_are_sent_as_they_are_written_and_old_runs_are_left_alone(tmp_path, told):
    write_run(tmp_path / "old", "none", steps=3)
    with following(tmp_path, ["wandb"], every_s=0.01), RunLog(tmp_path / "new") as log:
        log.write("header", method="phi")
        for step in (1, 2, 3):
            log.write("step", step=step, loss=1.0 / step, maxvio=float("nan"))
    assert [call[2]["name"] for call in told if call[1] == "init"] == ["run-new"]
    assert [call[2:] for call in told if call[1] == "log"] == [
        ({"train/loss": 1.0}, 1),
        ({"train/loss": 0.5}, 2),
        ({"train/loss": pytest.approx(1 / 3)}, 3),
    ]
    assert told[-1] == ("wandb", "finish", 0)


def test_a_run_that_goes_on_is_sent_from_its_start(tmp_path, told):
    write_run(tmp_path, "phi", steps=9, stop=4, evaluate=False)
    with following(tmp_path, ["trackio"], every_s=0.01), RunLog.resume(tmp_path, 4) as log:
        log.write("step", step=5, loss=1.0)
    assert [call[3] for call in told if call[1] == "log"] == [1, 2, 3, 4, 5]


def test_a_line_that_is_being_written_waits(tmp_path, told):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind":"header","format":1,"method":"phi"}\n{"kind":"step","step":1,"lo')
    track(path, ["wandb"])
    assert [call[1] for call in told] == ["init", "finish"]


def test_the_training_is_whole_when_a_tracker_fails(tmp_path, told, monkeypatch):
    def broken(**options: Any) -> None:
        raise RuntimeError("no such host")

    monkeypatch.setattr(sys.modules["wandb"], "init", broken)
    with (
        pytest.raises(RuntimeError, match="no such host"),
        following(tmp_path, ["wandb"], every_s=60),
    ):
        write_run(tmp_path / "run", "phi", steps=5)
    assert read_run(tmp_path / "run").status == "complete"


def test_names_say_where_a_number_comes_from():
    row = {"kind": "eval", "step": 4, "loss": 1.5, "mi": 0.2, "load": [[1.0]], "tokens": None}
    assert scalars(row, {}) == {"eval/loss": 1.5, "eval/mi": 0.2}
    header = {"model": {"layers": ["model.layers.7.mlp.gate"]}}
    snapshot = {"kind": "snapshot", "step": 4, "load": [[0.75, 0.25, 0.0, 0.0]]}
    assert scalars(snapshot, header) == {"moe/layer_7/maxvio": 2.0, "moe/layer_7/dead": 0.5}


def test_an_unknown_tracker_and_one_not_installed_are_refused(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", "phi", steps=3)
    with pytest.raises(ValueError, match="the trackers are tensorboard, wandb, trackio"):
        track(path, ["mlflow"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        track(path, ["wandb"])


def test_the_command_says_in_a_line_what_to_install(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", "phi", steps=3)
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = CliRunner().invoke(app, ["track", str(path), "--to", "wandb"])
    assert done.exit_code == 2
    assert "pip install wandb" in done.output
    assert "Traceback" not in done.output


def test_the_command_sends_finished_runs(tmp_path):
    write_run(tmp_path / "run", "phi", steps=3)
    asked = ["track", str(tmp_path), "--to", "tensorboard", "--folder", str(tmp_path / "out")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "Sent 1 run to tensorboard" in done.output
    assert "moe/gini" in events(tmp_path / "out" / "tensorboard" / "mixed-run")
