"""The run log: one JSON Lines file that says all a run has to say.

A run directory holds one ``log.jsonl``. Its first line is the header (what was run), then come
rows of kind ``step``, ``snapshot`` and ``eval`` as they happen, and one ``end`` row. The file is
strict JSON: a number that is not finite is written as ``null``. Every line is flushed, so a
killed run loses at most the line being written, and a reader forgives exactly that.

Nothing here imports torch: a log can be read on a machine that has never seen the model.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

FORMAT = 1
LOG_NAME = "log.jsonl"
KINDS = ("header", "step", "snapshot", "eval", "end")

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run as its log tells it.

    ``truncated`` is true where the last line was cut off; ``end`` is None where no end row was
    written (the process was killed, or is still running).
    """

    path: Path
    header: Row
    steps: tuple[Row, ...] = ()
    snapshots: tuple[Row, ...] = ()
    evals: tuple[Row, ...] = ()
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
        times = [s for row in self.steps if (s := _time(row.get("step_time_s"))) is not None]
        return statistics.median(times) if times else _time(self.header.get("step_time_s"))

    @property
    def last_step(self) -> int:
        """The last step any row speaks of; 0 for a run that ended before its first."""
        return max((row["step"] for row in (*self.steps, *self.snapshots, *self.evals)), default=0)


class RunLog:
    """Writes a run's log, line by line.

    Used as a context manager it also writes the end row: ``complete`` on a normal exit,
    ``interrupted`` on KeyboardInterrupt and ``failed``, with the error's words, on any other
    exception (which goes on its way). The file appears with the first row.

    Args:
        path: the run directory (made if missing), or a file whose name ends in ``.jsonl``.

    Raises:
        ValueError: the log ends in the middle of a line; :meth:`resume` repairs that.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with RunLog(folder) as log:
    ...         log.write("header", method="phi", seed=0)
    ...         log.write("step", step=1, loss=float("nan"))
    ...     run = read_run(folder)
    >>> run.method, run.steps[0]["loss"], run.status
    ('phi', None, 'complete')
    """

    def __init__(self, path: Path | str) -> None:
        self.path = _log_file(path)
        self._file: TextIO | None = None
        self._started_s = time.perf_counter()
        self._has_header = False
        self._has_end = False
        if self.path.exists() and self.path.stat().st_size:
            content = self.path.read_bytes()
            if not content.endswith(b"\n"):
                raise ValueError(
                    f"{self.path} ends in the middle of a line: the run that wrote it was killed. "
                    "Continue it with RunLog.resume(path, step), or choose another folder."
                )
            run = read_run(self.path)
            self._has_header, self._has_end = True, run.end is not None

    @classmethod
    def resume(cls, path: Path | str, step: int) -> RunLog:
        """Open a log to go on after ``step``: every row up to it stays, what came later goes.

        The end row goes as well (its ``wall_s`` is added to the new one), and so does a line that
        was cut off. The file is replaced in one rename: a crash here leaves the old log whole.

        Args:
            path: the run directory or its log file.
            step: the last optimizer step that the checkpoint contains.

        Raises:
            FileNotFoundError: there is no log.
            ValueError: ``step`` is negative, or the log is not one of ours.
        """
        if step < 0:
            raise ValueError(f"step must be 0 or more, got {step}")
        file = _log_file(path)
        kept, earlier_s = [], 0.0
        for line, row in _whole_lines(file)[0]:
            if row["kind"] == "end":
                earlier_s += _time(row.get("wall_s")) or 0.0
            elif row.get("step", 0) <= step:
                kept.append(line)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as out:
                out.writelines(line + b"\n" for line in kept)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        log = cls(file)
        log._started_s -= earlier_s
        return log

    def write(self, kind: str, **fields: Any) -> None:
        """Append one row and flush it.

        Args:
            kind: one of ``header``, ``step``, ``snapshot``, ``eval``, ``end``.
            fields: plain numbers, strings, lists and dicts.

        Raises:
            RuntimeError: the row comes at the wrong moment (no header yet, a second header,
                after the end row).
            TypeError: a field is not plain JSON.
            ValueError: the kind is unknown, or a row that needs a step has none.
        """
        self._check(kind, fields)
        row: dict[str, Any] = {"kind": kind}
        if kind == "header":
            row |= {"format": FORMAT}
        elif kind == "end":
            fields.setdefault("wall_s", round(time.perf_counter() - self._started_s, 3))
        line = json.dumps(
            _finite(row | fields), allow_nan=False, ensure_ascii=False, default=_not_plain
        )
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", errors="replace", newline="\n")
        self._file.write(line + "\n")
        self._file.flush()
        self._has_header = True
        self._has_end = kind == "end"

    def close(self) -> None:
        """Close the file; rows written so far stay, no end row is added."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._has_header and not self._has_end:
                if error is None:
                    self.write("end", status="complete")
                elif isinstance(error, KeyboardInterrupt):
                    self.write("end", status="interrupted")
                else:
                    self.write("end", status="failed", error=f"{type(error).__name__}: {error}")
        finally:
            self.close()

    def _check(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of row {kind!r}; the kinds are {', '.join(KINDS)}")
        if kind == "header" and self._has_header:
            raise RuntimeError(
                f"{self.path} already has a header: one file holds one run. "
                "Choose another folder, or continue that run with RunLog.resume(path, step)."
            )
        if kind != "header" and not self._has_header:
            raise RuntimeError(f"the first row must be the header, got {kind!r}")
        if self._has_end:
            raise RuntimeError(
                f"{self.path} already has its end row; go on with RunLog.resume(path, step)"
            )
        problem = _problem({"kind": kind, "format": FORMAT, **fields})
        if problem:
            raise ValueError(f"cannot write this {kind} row: {problem}")


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
    file = _log_file(path)
    lines, truncated = _whole_lines(file)
    rows: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for _, row in lines:
        rows.setdefault(row["kind"], []).append(row)
    if truncated:
        logger.warning("%s: the last line was cut off and is left out", file)
    return Run(
        path=file,
        header=rows["header"][0],
        steps=tuple(rows["step"]),
        snapshots=tuple(rows["snapshot"]),
        evals=tuple(rows["eval"]),
        end=rows["end"][-1] if rows["end"] else None,
        truncated=truncated,
    )


def archive(run: Run, folder: Path | str) -> Path:
    """Copy a run without its step rows: header, last snapshot, evaluations, end.

    A few kB instead of hundreds, enough for every table and for the figures that have no step axis;
    median step time is kept in the header as ``step_time_s``.
    """
    header = {**run.header, "step_time_s": run.step_time_s}
    rows = [header, *run.snapshots[-1:], *run.evals, *([run.end] if run.end else [])]
    path = Path(folder) / LOG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        encoding="utf-8",
        errors="replace",  # half a character, which JSON can hold and no file
    )
    return path


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


def _log_file(path: Path | str) -> Path:
    path = Path(path)
    return path if path.suffix == ".jsonl" or path.is_file() else path / LOG_NAME


def _whole_lines(file: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], bool]:
    """Each whole line of a log with the row it holds, and whether the last line was cut off."""
    if not file.exists():
        raise FileNotFoundError(f"there is no run log at {file}")
    lines = [(i, line) for i, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty: no header was written. Delete it and run again.")
    rows: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in lines:
        row, problem = _parse(line)
        if not rows:
            _check_header(file, line, row, problem)
        elif problem and number == lines[-1][0]:
            return rows, True
        elif not problem and row["kind"] == "header":
            problem = "a second header (one file holds one run)"
        if problem:
            raise ValueError(
                f"{file}, line {number}: {problem}. Every line but the last must be whole; remove "
                "that line to read the rest."
            )
        rows.append((line, row))
    return rows, False


def _check_header(file: Path, line: bytes, row: Row, problem: str) -> None:
    if problem or row["kind"] != "header":
        raise ValueError(
            f"{file} is not a moebalance run log: the first line must be the header, a JSON object "
            f'with "kind": "header", and is {line[:60]!r} ({problem or "another kind of row"}). '
            f"Give a {LOG_NAME} written by moebalance."
        )
    if row["format"] > FORMAT:
        raise ValueError(
            f"{file} has log format {row['format']}; this moebalance reads up to {FORMAT}. "
            "Upgrade moebalance to read it."
        )


def _parse(line: bytes) -> tuple[dict[str, Any], str]:
    """The row and an empty string, or an empty row and what is wrong with it."""
    try:
        # Python's reader would take NaN and Infinity, which are not JSON, and integers of any
        # length, of which nothing can be computed; read them as missing.
        whole, real = partial(_sane, int), partial(_sane, float)
        text = line.decode("utf-8")
        row = json.loads(text, parse_constant=lambda _: None, parse_int=whole, parse_float=real)
    except ValueError as error:
        return {}, f"not JSON ({error})"
    problem = _problem(row)
    return ({}, problem) if problem else (row, "")


def _sane(kind: type[int] | type[float], digits: str) -> float | None:
    # Far beyond what is measured, and its square and its sum with others are still numbers.
    return kind(digits) if abs(float(digits)) < 1e100 else None


def _problem(row: Any) -> str:
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return 'not a JSON object with a "kind"'
    if row["kind"] in ("step", "snapshot", "eval") and type(row.get("step")) is not int:
        return f'a {row["kind"]} row needs an integer "step", got {row.get("step")!r}'
    if row["kind"] == "header":
        if type(row.get("format")) is not int:
            return f'a header needs an integer "format", got {row.get("format")!r}'
        if not isinstance(row.get("method"), str):
            return f'a header needs a "method", got {row.get("method")!r}'
    return ""


def _time(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and 0 <= value < math.inf else None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _not_plain(value: Any) -> Any:
    raise TypeError(
        f"a log row holds plain numbers, strings, lists and dicts, got {type(value).__name__} "
        f"({value!r}); convert it first, e.g. with .item(), .tolist() or str()"
    )
