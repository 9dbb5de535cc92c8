"""TensorBoard, Weights & Biases and trackio as readers of the run log.

Training writes `log.jsonl` and knows no tracker. This module follows the file and sends its rows
on, under one set of names. (The reporters of the Trainer live in the training process: they could
not send finished runs, nor those of a comparison's workers, and would call `moe/maxvio`
`train/moe/maxvio`.)

| row | scalars |
|---|---|
| `step` | `train/loss`, `train/lr`, `train/step_time_s`, …; `moe/maxvio`, `moe/gini`, … |
| `snapshot` | `moe/layer_3/maxvio` and `moe/layer_3/dead`, a share, for every layer |
| `eval` | `eval/loss`, `eval/maxvio`, `eval/mi`, … |

A tracker that fails loses nothing: the log is whole, and :func:`track` sends it again. A tracker is
imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context
from pathlib import Path
from typing import Any, Protocol

from moebalance.report.estimates import finite
from moebalance.report.loads import layer_names, ratios
from moebalance.report.pack import DEAD
from moebalance.runlog import LOG_NAME, Row, Run, find_runs

_TRAIN = frozenset({"loss", "lr", "grad_norm", "step_time_s"})


class Sink(Protocol):
    """Where the scalars of one run go."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Take the scalars of one row."""

    def close(self, status: str) -> None:
        """The run ended: `complete`, `interrupted`, `failed`, or it has `no end row`."""


def track(path: Path | str, to: Sequence[str], *, folder: Path | str | None = None) -> list[Run]:
    """Send finished runs, or what there is of others, to trackers.

    Args:
        path: a run folder, a log, or a folder of runs.
        to: of `tensorboard`, `wandb`, `trackio`.
        folder: where TensorBoard and W&B write; `trackers` in each run's folder by default.

    Returns:
        The runs that were sent.

    Raises:
        ValueError: a tracker is unknown, or a log cannot be read.
        FileNotFoundError: there is no run.
        ModuleNotFoundError: a tracker is not installed.
    """
    check_trackers(to)
    runs = find_runs(path)
    for run in runs:
        reader = _Reader(run.path, to, folder)
        reader.read()
        reader.close()
    return runs


@contextmanager
def following(
    path: Path | str, to: Sequence[str], *, folder: Path | str | None = None, every_s: float = 1.0
) -> Iterator[None]:
    """Send every run that is written under `path` inside the block to trackers, as it is written.

    Runs that were there and do not change are left alone; one that is resumed is sent from its
    start. A tracker that fails does so in a thread of its own: training goes on, and the error
    comes up when the block has ended.

    Args:
        path: a run folder, or a folder of runs; may appear later.
        to: of `tensorboard`, `wandb`, `trackio`; none does nothing.
        folder: as for :func:`track`.
        every_s: seconds between looks at the logs.

    Raises:
        ValueError: a tracker is unknown.
        ModuleNotFoundError: a tracker is not installed.
    """
    check_trackers(to)
    if not to:
        yield
        return
    path = Path(path)
    readers: dict[Path, _Reader] = {}
    before = {log: log.stat().st_mtime_ns for log in path.rglob(LOG_NAME)}
    stop = threading.Event()

    def look() -> None:
        for log in sorted(path.rglob(LOG_NAME)):
            if log not in readers and before.get(log) != log.stat().st_mtime_ns:
                readers[log] = _Reader(log, to, folder)
        for reader in readers.values():
            reader.read()

    def watch() -> None:
        while not stop.wait(every_s):
            with suppress(OSError):  # a log is replaced as a run starts anew; the next look sees it
                look()

    thread = threading.Thread(target=watch, name="moebalance trackers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        look()
        for reader in readers.values():
            reader.close()


def scalars(row: Row, header: Row) -> dict[str, float]:
    """The named scalars of a row; empty for a header, an end, or a row of another kind.

    >>> scalars({"kind": "step", "step": 1, "loss": 2.5, "maxvio": 0.5, "note": "x"}, {})
    {'train/loss': 2.5, 'moe/maxvio': 0.5}
    """
    kind = row["kind"]
    if kind == "snapshot":
        return _by_layer(row, header)
    if kind not in ("step", "eval"):
        return {}
    found = {key: finite(row, key) for key in row if key not in ("kind", "step")}
    return {f"{_room(kind, key)}/{key}": x for key, x in found.items() if x is not None}


def check_trackers(names: Iterable[str]) -> None:
    """Refuse a tracker that is unknown or not installed.

    Raises:
        ValueError: unknown.
        ModuleNotFoundError: not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}; the trackers are {', '.join(TRACKERS)}")
        _module(name)


class _TensorBoard:
    def __init__(self, header: Row, name: str, folder: Path) -> None:
        _module("tensorboard")
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._writer = writer.EventFileWriter(str(folder / "tensorboard" / name))

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        event = self._event(step=step)
        for tag, value in scalars.items():
            event.summary.value.add(tag=tag, simple_value=value)
        self._writer.add_event(event)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class _Logger:
    """A run of W&B or trackio, which take rows alike."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, status: str) -> None:
        self._run.finish()


class _WeightsAndBiases(_Logger):
    """Online or offline as `WANDB_MODE` says."""

    def close(self, status: str) -> None:
        self._run.finish(exit_code=int(status != "complete"))


def _wandb(header: Row, name: str, folder: Path) -> Sink:
    folder.mkdir(parents=True, exist_ok=True)
    # Runs of a comparison are open side by side: create_new here, a context of its own below.
    options = {**_about(header, name), "dir": str(folder), "reinit": "create_new"}
    return _WeightsAndBiases(_module("wandb").init(**options))


def _trackio(header: Row, name: str, folder: Path) -> Sink:
    """In trackio's own local database, unless its own variables say otherwise."""
    off = dict.fromkeys(("embed", "auto_log_gpu", "auto_log_cpu"), False)
    return _Logger(Context().run(_module("trackio").init, **_about(header, name), **off))


def _about(header: Row, name: str) -> dict[str, Any]:
    project = str(header.get("name") or "moebalance")
    return {"project": project, "name": name, "config": dict(header)}


TRACKERS: dict[str, Callable[[Row, str, Path], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


class _Reader:
    """Reads a log as it grows, and hands each row to the run's sinks once."""

    def __init__(self, log: Path, to: Sequence[str], folder: Path | str | None) -> None:
        self._log, self._to = log, to
        self._folder = Path(folder) if folder is not None else log.parent / "trackers"
        self._read_bytes, self._status = 0, "no end row"
        self._header: Row = {}
        self._sinks: list[Sink] = []

    def read(self) -> None:
        with self._log.open("rb") as file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._read_bytes += len(line)
                if line.strip():
                    self._send(json.loads(line))

    def close(self) -> None:
        for sink in self._sinks:
            sink.close(self._status)

    def _send(self, row: Row) -> None:
        if row["kind"] == "header":
            self._header = row
            name = f"{row.get('batching') or 'run'}-{self._log.resolve().parent.name}"
            name = re.sub(r"[^\w.+-]+", "-", name)
            self._sinks = [TRACKERS[to](row, name, self._folder) for to in self._to]
        elif row["kind"] == "end":
            self._status = str(row.get("status"))
        elif found := scalars(row, self._header):
            for sink in self._sinks:
                sink.write(found, row["step"])


def _room(kind: str, key: str) -> str:
    return "eval" if kind == "eval" else "train" if key in _TRAIN else "moe"


def _by_layer(row: Row, header: Row) -> dict[str, float]:
    grid = ratios(row, "load")
    names = layer_names(Run(Path(), header), len(grid))
    found = {}
    for name, layer in zip(names, grid, strict=True):
        known = [ratio for ratio in layer if ratio is not None and math.isfinite(ratio)]
        if known:
            place = f"moe/{name.replace(' ', '_')}"
            found[f"{place}/maxvio"] = max(known) - 1
            found[f"{place}/dead"] = sum(ratio < DEAD for ratio in known) / len(known)
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the tracker {name} is not installed: pip install {name}"
        ) from error
