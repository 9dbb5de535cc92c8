"""The run log: what is written is what is read, and what was cut off costs one line."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from moebalance.runlog import FORMAT, LOG_NAME, RunLog, find_runs, read_run


def started(folder: Path, steps: int = 0) -> RunLog:
    log = RunLog(folder)
    log.write("header", method="phi", seed=3, batching="mixed", steps=10)
    for step in range(1, steps + 1):
        log.write("step", step=step, loss=1.0 / step)
        if step % 2 == 0:
            log.write("eval", step=step, loss=2.0)
    return log


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_read(tmp_path):
    with started(tmp_path, steps=2) as log:
        log.write("snapshot", step=2, load=[[0.5, 0.5]])
    run = read_run(tmp_path)
    assert run.path == tmp_path / LOG_NAME
    assert (run.method, run.seed, run.batching, run.header["format"]) == ("phi", 3, "mixed", FORMAT)
    assert [row["step"] for row in run.steps] == [1, 2]
    assert run.snapshots[0]["load"] == [[0.5, 0.5]]
    assert run.evals[0]["loss"] == 2.0
    assert (run.status, run.truncated, run.last_step) == ("complete", False, 2)
    assert run.end is not None
    assert run.end["wall_s"] >= 0


def test_every_row_is_on_disk_at_once(tmp_path):
    log = started(tmp_path, steps=1)
    assert len(rows(log.path)) == 2
    log.close()


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with started(tmp_path) as log:
        log.write("step", step=1, loss=float("nan"), load=[1.0, float("inf")], inner={"a": -1e999})
    text = log.path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    row = read_run(tmp_path).steps[0]
    assert (row["loss"], row["load"], row["inner"]) == (None, [1.0, None], {"a": None})


def test_nan_from_another_writer_is_read_as_missing(tmp_path):
    log = started(tmp_path)
    log.close()
    with log.path.open("a") as file:
        file.write('{"kind": "step", "step": 1, "loss": NaN}\n')
    assert read_run(tmp_path).steps[0]["loss"] is None


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "interrupted"), (ArithmeticError("loss is nan"), "failed")],
)
def test_the_end_row_says_how_the_run_ended(tmp_path, error, status):
    with pytest.raises(type(error)), started(tmp_path, steps=1):
        raise error
    run = read_run(tmp_path)
    assert run.status == status
    assert run.end is not None
    assert run.end.get("error") == ("ArithmeticError: loss is nan" if status == "failed" else None)


def test_an_end_row_written_by_hand_is_the_only_one(tmp_path):
    with started(tmp_path) as log:
        log.write("end", status="interrupted", wall_s=4.5)
    assert [row["kind"] for row in rows(log.path)] == ["header", "end"]
    assert read_run(tmp_path).end == {"kind": "end", "status": "interrupted", "wall_s": 4.5}


def test_a_failure_before_the_header_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="no data"), RunLog(tmp_path / "run") as log:
        raise OSError("no data")
    assert not log.path.exists()


def test_a_file_can_be_named_instead_of_a_folder(tmp_path):
    with RunLog(tmp_path / "mine.jsonl") as log:
        log.write("header", method="none")
    assert read_run(tmp_path / "mine.jsonl").method == "none"


def test_rows_at_the_wrong_moment_are_refused(tmp_path):
    log = RunLog(tmp_path)
    with pytest.raises(RuntimeError, match="first row must be the header"):
        log.write("step", step=1)
    log.write("header", method="phi")
    with pytest.raises(RuntimeError, match="one file holds one run"):
        log.write("header", method="phi")
    with pytest.raises(ValueError, match="unknown kind"):
        log.write("note", text="hello")
    with pytest.raises(ValueError, match='integer "step"'):
        log.write("step", loss=1.0)
    with pytest.raises(TypeError, match=r"got complex"):
        log.write("step", step=1, loss=1j)
    log.write("end", status="complete")
    with pytest.raises(RuntimeError, match="end row"):
        log.write("step", step=1)
    log.close()
    assert [row["kind"] for row in rows(log.path)] == ["header", "end"]


def test_a_second_run_cannot_be_written_into_the_same_file(tmp_path):
    started(tmp_path, steps=1).close()
    with pytest.raises(RuntimeError, match=r"RunLog\.resume"):
        started(tmp_path)


def test_a_header_without_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match='"method"'):
        RunLog(tmp_path).write("header", seed=0)


@pytest.mark.survives(
    "Files and pages",
    "The last line of a log was cut off",
    "warned: and read without it",
)
def test_a_cut_off_last_line_is_forgiven_with_a_warning(tmp_path, caplog):
    log = started(tmp_path, steps=3)
    log.close()
    whole = log.path.read_bytes()
    last = whole.rstrip(b"\n").rsplit(b"\n", 1)[1]
    # Cut anywhere inside the last line: everything before it is read.
    for cut in range(2, len(last) + 1):
        log.path.write_bytes(whole[:-cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run = read_run(tmp_path)
        assert run.truncated
        assert [row["step"] for row in run.steps] == [1, 2]
        assert "cut off" in caplog.text
    log.path.write_bytes(whole[:-1])
    assert len(read_run(tmp_path).steps) == 3


def test_a_cut_off_log_cannot_be_appended_to_by_mistake(tmp_path):
    log = started(tmp_path, steps=3)
    log.close()
    log.path.write_bytes(log.path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"RunLog\.resume"):
        RunLog(tmp_path)


@pytest.mark.survives(
    "Files and pages",
    "A line in the middle of a log is broken",
    "refused: with its number",
)
def test_a_broken_line_in_the_middle_is_named(tmp_path):
    log = started(tmp_path, steps=3)
    log.close()
    lines = log.path.read_text().splitlines()
    lines[2] = lines[2][:9]
    log.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"line 3: not JSON"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"step,loss\n1,2.0\n", "not a moebalance run log"),
        (b'{"kind": "step", "step": 1}\n', "first line must be the header"),
        (b'{"kind": "header", "method": "phi"}\n', 'integer "format"'),
        (b"[1, 2]\n", "not a moebalance run log"),
        (b"\xff\xfe\x00", "not a moebalance run log"),
        (b'{"kind": "header", "format": 99, "method": "phi"}\n', "Upgrade"),
        (b'{"kind":"header","format":1,"method":"phi"}\n' * 2 + b'{"kind":"end"}\n', "line 2"),
        (b'{"kind":"header","format":1,"method":"phi"}\n{"kind":"step"}\n{"kind":"end"}', "line 2"),
    ],
)
def test_a_file_that_is_no_log_is_refused_by_name(tmp_path, content, words):
    (tmp_path / LOG_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_run(tmp_path)
    assert str(tmp_path / LOG_NAME) in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_a_log_that_is_no_file_is_refused_before_it_is_read(tmp_path, kind):
    log = tmp_path / LOG_NAME
    make = {"folder": log.mkdir, "pipe": lambda: os.mkfifo(log)}
    make.get(kind, lambda: log.symlink_to("/dev/zero"))()
    for read in (read_run, find_runs, lambda path: RunLog.resume(path, 1)):
        with pytest.raises(ValueError, match="a run log is a file") as told:
            read(tmp_path)
        assert str(log) in str(told.value)


def test_rows_of_a_kind_unknown_here_are_ignored(tmp_path):
    log = started(tmp_path, steps=1)
    log.close()
    with log.path.open("a") as file:
        file.write('{"kind": "remark", "text": "later"}\n{"kind": "end", "status": "complete"}\n')
    assert read_run(tmp_path).status == "complete"


@pytest.mark.parametrize("cut", [0, 7])
def test_resume_keeps_what_the_checkpoint_knows(tmp_path, cut):
    log = started(tmp_path, steps=6)
    log.write("end", status="interrupted", wall_s=100.0)
    log.close()
    if cut:
        log.path.write_bytes(log.path.read_bytes()[:-cut])
    before = log.path.read_text().splitlines()
    with RunLog.resume(tmp_path, 3) as log:
        assert log.path.read_text().splitlines() == before[:5]  # header, step 1 2, eval 2, step 3
        log.write("step", step=4, loss=9.0)
    run = read_run(tmp_path)
    assert [row["step"] for row in run.steps] == [1, 2, 3, 4]
    assert [row["step"] for row in run.evals] == [2]
    assert run.steps[-1]["loss"] == 9.0
    assert run.status == "complete"
    assert run.end is not None
    assert (run.end["wall_s"] >= 100) == (cut == 0)
    assert [path.name for path in tmp_path.iterdir()] == [LOG_NAME]


@pytest.mark.survives(
    "Killed and resumed",
    "A crash while a log is cut back to its checkpoint",
    "goes on: the old log is whole",
)
def test_a_crash_while_resuming_leaves_the_old_log_whole(tmp_path, monkeypatch):
    log = started(tmp_path, steps=4)
    log.close()
    before = log.path.read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        RunLog.resume(tmp_path, 1)
    assert log.path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [log.path]


def test_resume_wants_a_log_and_a_step(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run log"):
        RunLog.resume(tmp_path, 3)
    started(tmp_path).close()
    with pytest.raises(ValueError, match="0 or more"):
        RunLog.resume(tmp_path, -1)


def test_find_runs_walks_a_folder_in_order(tmp_path):
    for name in ("b/2", "a", "b/10"):
        started(tmp_path / name, steps=1).close()
    found = find_runs(tmp_path)
    assert [run.path.parent.relative_to(tmp_path).as_posix() for run in found] == [
        "a",
        "b/10",
        "b/2",
    ]
    assert [run.path for run in find_runs(tmp_path / "a" / LOG_NAME)] == [tmp_path / "a" / LOG_NAME]
    assert len(find_runs(str(tmp_path / "b"))) == 2


def test_find_runs_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"no {LOG_NAME}"):
        find_runs(tmp_path)
