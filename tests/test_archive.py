"""`report --archive` keeps every run, under a name that says which one it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebalance.lab.archive import archive_runs
from moebalance.lab.cli import app
from moebalance.runlog import LOG_NAME, Run, read_run
from synthetic_runs import write_run


def run_at(folder: Path, batching: str = "mixed") -> Path:
    return write_run(folder, "phi", steps=2, experts=4, batching=batching)


def places(copies: list[Path], to: Path) -> list[str]:
    return [copy.parent.relative_to(to).as_posix() for copy in copies]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (["a/phi", "a/none"], ["mixed/phi", "mixed/none"]),
        (["r1/seed0", "r2/seed0"], ["mixed/r1/seed0", "mixed/r2/seed0"]),
        (
            ["a/r/seed0", "b/r/seed0", "seed1"],
            ["mixed/a/r/seed0", "mixed/b/r/seed0", "mixed/seed1"],
        ),
        (["seed0", "seed0/seed0"], None),
        (["seed0", "seed0"], ["mixed/seed0"]),
    ],
    ids=["names of their own", "one name", "one name twice", "one in the other", "given twice"],
)
def test_every_run_is_archived_by_a_name_of_its_own(
    tmp_path: Path, where: list[str], kept: list[str] | None
) -> None:
    for place in set(where):
        run_at(tmp_path / place)
    copies = archive_runs([read_run(tmp_path / place) for place in where], tmp_path / "kept")
    assert len(set(copies)) == len(set(where)) == len(list((tmp_path / "kept").rglob(LOG_NAME)))
    assert kept is None or places(copies, tmp_path / "kept") == kept


def test_one_name_under_two_kinds_of_micro_batch_stays_short(tmp_path: Path) -> None:
    runs = [read_run(run_at(tmp_path / kind / "phi", kind)) for kind in ("mixed", "one-domain")]
    copies = archive_runs(runs, tmp_path / "kept")
    assert places(copies, tmp_path / "kept") == ["mixed/phi", "one-domain/phi"]


def test_traces_in_one_folder_are_told_apart_by_their_files(tmp_path: Path) -> None:
    run = read_run(run_at(tmp_path / "log"))
    traces = [Run(tmp_path / "t" / name, run.header) for name in ("a.npy", "b.npy")]
    copies = archive_runs(traces, tmp_path / "kept")
    assert places(copies, tmp_path / "kept") == ["mixed/t/a.npy", "mixed/t/b.npy"]


def test_report_says_how_many_logs_it_archived(tmp_path: Path) -> None:
    for place in ("r1", "r2"):
        run_at(tmp_path / "runs" / place / "seed0")
    to = tmp_path / "kept"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "runs"), "--archive", str(to)])
    assert done.exit_code == 0, done.output
    assert f"Archived 2 logs in {to}" in done.output.replace("\n", "")
    assert len(list(to.rglob(LOG_NAME))) == 2
