"""Read run logs, line by line."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebalance.files import write_text
from moebalance.runlog.columns import Rows, column
from moebalance.runlog.rows import LOG_NAME, Row, check_header, parse, time

logger = logging.getLogger("moebalance.runlog")


@dataclass(frozen=True)
class Run:
    """One run as its log tells it.

    ``truncated`` is true where the last line was cut off; ``end`` is None where no end row was
    written (the process was killed, or is still running).
    """

    path: Path
    header: Row
    steps: Sequence[Row] = ()
    snapshots: Sequence[Row] = ()
    evals: Sequence[Row] = ()
    end: Row | None = None
    truncated: bool = False

    @property
    def method(self) -> str:
        """The method's key, e.g. ``"phi"``."""
        return str(self.header["method"])

    @property
    def method_repr(self) -> str:
        """The method with its hyper-parameters, as its ``repr``; empty if not recorded."""
        return str(self.header.get("method_repr") or "")

    @property
    def seed(self) -> int | None:
        """The seed, or None if not recorded."""
        seed = self.header.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def batching(self) -> str:
        """How micro-batches were drawn, e.g. ``"mixed"`` or ``"one-domain"``."""
        return str(self.header.get("batching") or "unspecified")

    @property
    def status(self) -> str:
        """What the end row says, or ``"no end row"``."""
        return str(self.end.get("status") or "unspecified") if self.end else "no end row"

    @property
    def step_time_s(self) -> float | None:
        """Median time of a step; from the header where the step rows were archived away."""
        times = [s for t in column(self.steps, "step_time_s") if (s := time(t)) is not None]
        return statistics.median(times) if times else time(self.header.get("step_time_s"))

    @property
    def last_step(self) -> int:
        """The last step any row speaks of; 0 for a run that ended before its first."""
        rows = (self.steps, self.snapshots, self.evals)
        return max((step for some in rows for step in column(some, "step")), default=0)


def read_run(path: Path | str) -> Run:
    """Read one run.

    A last line that was cut off is reported through ``logging`` and left out; everything before
    it is kept.

    Args:
        path: the run directory, or the log file itself.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: the file is not a run log, was written by a newer moebalance, or is damaged
            before its last line (the message names the line).
    """
    file = log_file(path)
    found, kept = WholeRows(file), {kind: Rows() for kind in ("step", "snapshot", "eval")}
    header: Row = {}
    end: Row | None = None
    for _, row in found:
        kind = row["kind"]
        if kind == "header":
            header = row
        elif kind == "end":
            end = row
        elif kind in kept:
            kept[kind].append(row)
    if found.truncated:
        logger.warning("%s: the last line was cut off and is left out", file)
    return Run(
        path=file,
        header=header,
        steps=kept["step"],
        snapshots=kept["snapshot"],
        evals=kept["eval"],
        end=end,
        truncated=found.truncated,
    )


def archive(run: Run, folder: Path | str) -> Path:
    """Copy a run without its step rows: header, last snapshot, evaluations, end.

    A few kB instead of hundreds, enough for every table and for the figures that have no step axis;
    median step time is kept in the header as ``step_time_s``.
    """
    header = {**run.header, "step_time_s": run.step_time_s}
    rows = [header, *run.snapshots[-1:], *run.evals, *([run.end] if run.end else [])]
    path = Path(folder) / LOG_NAME
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Half a character, which JSON can hold and no file, becomes a question mark.
    return write_text(path, "".join(lines).encode("utf-8", "replace").decode())


def find_runs(path: Path | str) -> list[Run]:
    """Every run under a folder (or the one run of a file), sorted by path.

    Raises:
        FileNotFoundError: ``path`` does not exist, or no ``log.jsonl`` lies under it.
        ValueError: one of the logs cannot be read; see :func:`read_run`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run directory or a folder of runs")
    files = [path] if path.is_file() else sorted(path.rglob(LOG_NAME))
    if not files:
        raise FileNotFoundError(
            f"no {LOG_NAME} under {path}; give a run directory, or a folder that holds some"
        )
    return [read_run(file) for file in files]


def log_file(path: Path | str) -> Path:
    """The log in a run directory, or the log itself."""
    path = Path(path)
    return path if path.suffix == ".jsonl" or path.is_file() else path / LOG_NAME


class WholeRows:
    """The whole rows of a log, each with its line, read one by one.

    Attributes:
        truncated: after the last one, whether a last line was cut off.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: see `read_run`.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.truncated = file, False

    def __iter__(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        if not self.file.exists():
            raise FileNotFoundError(f"there is no run log at {self.file}")
        if not self.file.is_file():  # a pipe would be waited for, a device read without end
            raise ValueError(
                f"{self.file} is a folder, a pipe or a device; a run log is a file. Move it away."
            )
        begun, hurt = False, ""
        with self.file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                if hurt:  # and it was not the last one
                    raise ValueError(hurt)
                row, found = parse(line.rstrip(b"\n"))
                if not begun:
                    check_header(self.file, line, row, found)
                    begun = True
                elif not found and row["kind"] == "header":
                    raise ValueError(self._hurt(number, "a second header (one file holds one run)"))
                if found:
                    hurt = self._hurt(number, found)
                else:
                    yield line.rstrip(b"\n"), row
        if not begun:
            raise ValueError(
                f"{self.file} is empty: no header was written. Delete it and run again."
            )
        self.truncated = bool(hurt)

    def _hurt(self, number: int, found: str) -> str:
        return (
            f"{self.file}, line {number}: {found}. Every line but the last must be whole; remove "
            "that line to read the rest."
        )
