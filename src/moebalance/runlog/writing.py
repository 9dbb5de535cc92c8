"""Write a run log, line by line."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from moebalance.files import writing
from moebalance.runlog.reading import WholeRows, log_file
from moebalance.runlog.rows import FORMAT, KINDS, problem
from moebalance.runlog.rows import time as time_of

logger = logging.getLogger("moebalance.runlog")


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
        self.path = log_file(path)
        self._file: TextIO | None = None
        self._started_s = time.perf_counter()
        self._has_header = False
        self._has_end = False
        if self.path.exists() and self.path.stat().st_size:
            _check_last_line(self.path)
            self._has_header = True
            self._has_end = [row["kind"] for _, row in WholeRows(self.path)][-1] == "end"

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
        file = log_file(path)
        earlier_s = 0.0
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with writing(file), temporary.open("wb") as out:
                for line, row in WholeRows(file):
                    if row["kind"] == "end":
                        earlier_s += time_of(row.get("wall_s")) or 0.0
                    elif row["kind"] == "header" or row.get("step", 0) <= step:
                        out.write(line + b"\n")
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
            # Half a character, which JSON can hold and no file, becomes a question mark.
            self._file = self.path.open("a", encoding="utf-8", errors="replace", newline="\n")
        with writing(self.path):
            self._file.write(line + "\n")
            self._file.flush()
        self._has_header = True
        self._has_end = kind == "end"

    def close(self) -> None:
        """Close the file; rows written so far stay, no end row is added."""
        if self._file is not None:
            with suppress(OSError):  # of a line that `write` has told could not be written
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
        except OSError as full:
            if error is None:
                raise
            logger.warning("The log has no end row: %s", full)  # what ended the run goes on its way
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
        found = problem({"kind": kind, "format": FORMAT, **fields})
        if found:
            raise ValueError(f"cannot write this {kind} row: {found}")


def _check_last_line(path: Path) -> None:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            raise ValueError(
                f"{path} ends in the middle of a line: the run that wrote it was killed. "
                "Continue it with RunLog.resume(path, step), or choose another folder."
            )


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
