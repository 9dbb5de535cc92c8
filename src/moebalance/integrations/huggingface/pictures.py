"""Pictures, tables and more numbers of the load, handed to the Trainer's own reporters.

A Trainer's log entries hold numbers alone, and a terminal shows all of them. So what only a tracker
can show goes to the reporter itself: to TensorBoard's writer, to W&B's run, or to trackio's.
"""

import logging
from collections.abc import Iterator
from typing import Any

from moebalance.metrics.shown import COLUMNS, Shown, markdown

logger = logging.getLogger("moebalance")
_KINDS = {
    "TensorBoardCallback": "tb_writer",
    "WandbCallback": "_wandb",
    "TrackioCallback": "_trackio",
}
"""Where each reporter of Transformers keeps what it writes to."""


def send(trainer: Any, shown: Shown, step: int) -> bool:
    """Hand what is shown to every reporter of the trainer that takes pictures.

    Returns:
        Whether it is worth to go on: False after a failure, which is told once and ends nothing.
    """
    try:
        for kind, target in _reporters(trainer):
            (_write if kind == "TensorBoardCallback" else _log)(target, shown, step)
    except Exception as error:
        logger.warning(
            "moebalance: a reporter did not take the picture of the load, so no more is sent; the "
            "metrics in the log entries go on (%s: %s).",
            type(error).__name__,
            error,
        )
        return False
    return True


def _reporters(trainer: Any) -> Iterator[tuple[str, Any]]:
    for callback in trainer.callback_handler.callbacks:
        for kind in (parent.__name__ for parent in type(callback).__mro__):
            target = getattr(callback, _KINDS[kind], None) if kind in _KINDS else None
            if target is not None:
                yield kind, target


def _write(writer: Any, shown: Shown, step: int) -> None:
    for tag, value in shown.scalars.items():
        writer.add_scalar(tag, value, step)
    for tag, pixels in shown.images.items():
        writer.add_image(tag, pixels, step, dataformats="HWC")
    for tag, rows in shown.tables.items():
        writer.add_text(tag, markdown(rows), step)


def _log(package: Any, shown: Shown, step: int) -> None:
    row: dict[str, Any] = dict(shown.scalars)
    row |= {tag: package.Image(pixels) for tag, pixels in shown.images.items()}
    for tag, rows in shown.tables.items():
        row[tag] = package.Table(columns=list(COLUMNS), data=rows)
    # The axis that the reporters of Transformers use; these packages count their own calls.
    package.log({**row, "train/global_step": step})
