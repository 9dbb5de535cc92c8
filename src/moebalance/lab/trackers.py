"""TensorBoard, Weights & Biases and trackio as readers of the run log.

Training writes `log.jsonl` and knows no tracker. This module follows the file and sends its rows
on, under one set of names. (The reporters of the Trainer live in the training process: they could
not send finished runs, nor those of a comparison's workers, and would call `moe/maxvio`
`train/moe/maxvio`.)

| row | scalars | pictures |
|---|---|---|
| `step` | `train/loss`, `train/lr`, `train/step_time_s`, …; `moe/maxvio`, `moe/gini`, … | |
| `snapshot` | `moe/layers/maxvio_p90`, …; `moe/layer_3/maxvio`, … | `moe/load`, `moe/extremes` |
| `eval` | `eval/loss`, `eval/maxvio`, `eval/mi`, … | `eval/load`, `eval/extremes` |

A tracker that fails loses nothing: the log is whole, and :func:`track` sends it again. A tracker is
imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import Context
from pathlib import Path
from typing import Any, Protocol

from moebalance.cleaning import for_path
from moebalance.lab.shown import layers_of, picture
from moebalance.metrics.image import png
from moebalance.metrics.shown import (
    COLUMNS,
    Pace,
    Show,
    Shown,
    by_layer,
    extremes,
    markdown,
    percentiles,
)
from moebalance.report.estimates import finite
from moebalance.runlog import LOG_NAME, Row, Run, find_runs
from moebalance.runlog.rows import parse

EVERYTHING = Show()
_TRAIN = frozenset({"loss", "lr", "grad_norm", "step_time_s"})


class Sink(Protocol):
    """Where the numbers and pictures of one run go."""

    def write(self, shown: Shown, step: int) -> None:
        """Take what one row has."""

    def close(self, status: str) -> None:
        """The run ended: `complete`, `interrupted`, `failed`, or it has `no end row`."""


def track(
    path: Path | str,
    to: Sequence[str],
    *,
    folder: Path | str | None = None,
    show: Show = EVERYTHING,
) -> list[Run]:
    """Send finished runs, or what there is of others, to trackers.

    Args:
        path: a run folder, a log, or a folder of runs.
        to: of `tensorboard`, `wandb`, `trackio`.
        folder: where TensorBoard and W&B write; `trackers` in each run's folder by default.
        show: what to send next to the scalars of each row.

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
        reader = _Reader(run.path, to, folder, show)
        reader.read()
        reader.close()
    return runs


@contextmanager
def following(
    path: Path | str,
    to: Sequence[str],
    *,
    folder: Path | str | None = None,
    every_s: float = 1.0,
    show: Show = EVERYTHING,
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
        show: what to send next to the scalars of each row.

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
                readers[log] = _Reader(log, to, folder, show)
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


def shown(row: Row, header: Row, show: Show, pace: Pace) -> Shown:
    """What a row has for a tracker; nothing for a header, an end, or a row of another kind."""
    kind = row["kind"]
    if kind not in ("step", "snapshot", "eval"):
        return Shown()
    numbers = scalars(row, header, show)
    pictures = (show.images or show.tables) and bool(row.get("load"))
    if not pictures or not pace.due(kind, row["step"]):
        return Shown(numbers)
    room = "eval" if kind == "eval" else "moe"
    image = picture(row) if show.images else None
    table = extremes(layers_of(row, header)) if show.tables else []
    return Shown(
        numbers,
        {} if image is None else {f"{room}/load": image},
        {f"{room}/extremes": table} if table else {},
    )


def scalars(row: Row, header: Row, show: Show = EVERYTHING) -> dict[str, float]:
    """The named scalars of a row.

    >>> scalars({"kind": "step", "step": 1, "loss": 2.5, "maxvio": 0.5, "note": "x"}, {})
    {'train/loss': 2.5, 'moe/maxvio': 0.5}
    """
    kind = row["kind"]
    if kind == "snapshot":
        layers = layers_of(row, header)
        found = percentiles(layers) if show.percentiles else {}
        found |= by_layer(layers) if show.layers else {}
        return {f"moe/{name}": value for name, value in found.items()}
    if kind not in ("step", "eval"):
        return {}
    numbers = {key: finite(row, key) for key in row if key not in ("kind", "step")}
    return {f"{_room(kind, key)}/{key}": x for key, x in numbers.items() if x is not None}


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
        self._text = importlib.import_module("tensorboard.plugins.text.summary_v2").text_pb
        self._writer = writer.EventFileWriter(str(folder / "tensorboard" / name))

    def write(self, shown: Shown, step: int) -> None:
        event = self._event(step=step)
        for tag, value in shown.scalars.items():
            event.summary.value.add(tag=tag, simple_value=value)
        for tag, pixels in shown.images.items():
            image = event.summary.value.add(tag=tag).image
            image.height, image.width, image.colorspace = pixels.shape
            image.encoded_image_string = png(pixels)
        for tag, rows in shown.tables.items():
            event.summary.MergeFrom(self._text(tag, markdown(rows)))
        self._writer.add_event(event)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class _Logger:
    """A run of W&B or trackio, which take rows alike, and have pictures of one form."""

    def __init__(self, run: Any, package: Any) -> None:
        self._run, self._package = run, package

    def write(self, shown: Shown, step: int) -> None:
        row: dict[str, Any] = dict(shown.scalars)
        row |= {tag: self._package.Image(pixels) for tag, pixels in shown.images.items()}
        for tag, rows in shown.tables.items():
            row[tag] = self._package.Table(columns=list(COLUMNS), data=rows)
        self._run.log(row, step=step)

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
    package = _module("wandb")
    return _WeightsAndBiases(package.init(**options), package)


def _trackio(header: Row, name: str, folder: Path) -> Sink:
    """In trackio's own local database, unless its own variables say otherwise."""
    off = dict.fromkeys(("embed", "auto_log_gpu", "auto_log_cpu"), False)
    package = _module("trackio")
    return _Logger(Context().run(package.init, **_about(header, name), **off), package)


def _about(header: Row, name: str) -> dict[str, Any]:
    project = for_path(str(header.get("name") or "moebalance"))
    return {"project": project, "name": name, "config": dict(header)}


TRACKERS: dict[str, Callable[[Row, str, Path], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


class _Reader:
    """Reads a log as it grows, and hands each row to the run's sinks once."""

    def __init__(self, log: Path, to: Sequence[str], folder: Path | str | None, show: Show) -> None:
        self._log, self._to, self._show, self._pace = log, to, show, Pace()
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
                    row, found = parse(line)
                    if found:
                        raise ValueError(f"{self._log} cannot be followed: {found}")
                    self._send(row)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close(self._status)

    def _send(self, row: Row) -> None:
        if row["kind"] == "header":
            self._header, self._pace = row, Pace(row.get("steps"))
            name = f"{row.get('batching') or 'run'}-{self._log.resolve().parent.name}"
            name = for_path(name)
            self._sinks = [TRACKERS[to](row, name, self._folder) for to in self._to]
        elif row["kind"] == "end":
            self._status = str(row.get("status"))
        elif any(found := shown(row, self._header, self._show, self._pace)):
            for sink in self._sinks:
                sink.write(found, row["step"])


def _room(kind: str, key: str) -> str:
    return "eval" if kind == "eval" else "train" if key in _TRAIN else "moe"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the tracker {name} is not installed: pip install {name}"
        ) from error
