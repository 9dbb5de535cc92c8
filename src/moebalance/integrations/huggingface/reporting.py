"""Complete a Trainer's log entries before its reporters read them, and hand them pictures.

A Trainer calls its reporters (TensorBoard, W&B, …) before the callbacks that it is given, and tells
a callback nothing of the others. So a callback that adds metrics takes a place in front of them,
for log entries alone: every other event stays in the order of the Trainer.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from moebalance.core.handle import Balancing
from moebalance.integrations.huggingface.pictures import send
from moebalance.metrics.image import load_image
from moebalance.metrics.shown import (
    Pace,
    Show,
    Shown,
    by_layer,
    extremes,
    multiples,
    percentiles,
)

SHOWN = ("percentiles", "images", "tables")


class Reporting(TrainerCallback):
    """A callback that adds metrics to training log entries, for every reporter of the Trainer.

    Args:
        prefix: put before each metric's name in the logs.
        show: what reporters show next to them, of `percentiles`, `images`, `tables` and `layers`.

    Raises:
        ValueError: a word of `show` is unknown.
    """

    def __init__(self, prefix: str, show: Iterable[str]) -> None:
        words = show.split(",") if isinstance(show, str) else show
        self.prefix, self.show = prefix, Show.of(words)
        self._completed: dict[str, Any] | None = None
        self._pace: Pace | None = None
        self._sends = self.show != Show.of(())

    @property
    def balancing(self) -> Balancing:
        """The handle on the layers that are reported."""
        raise NotImplementedError

    def measured(self, logs: dict[str, Any]) -> dict[str, float]:
        """The metrics of the step that one training log entry is about."""
        raise NotImplementedError

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place in front."""
        _lead(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place in front, if this callback was added after the Trainer was made."""
        self._pace = None
        _lead(self)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the metrics to a training log entry, once."""
        if logs is None or "loss" not in logs or logs is self._completed:
            return
        self._completed = logs
        found = {self.prefix + name: value for name, value in self.measured(logs).items()}
        for entry in (logs, *state.log_history[-1:]):
            entry.update(found)
        if found and self._sends and state.is_world_process_zero:
            trainer = calling_trainer(self)
            self._sends = trainer is None or send(trainer, self._shown(state), state.global_step)

    def _shown(self, state: Any) -> Shown:
        """What goes to the Trainer's reporters themselves; a picture and a table if one is due."""
        self._pace = self._pace or Pace(state.max_steps)
        due = self._pace.due("step", state.global_step)
        layers = multiples({n: hard.cpu() for n, (hard, _) in self.balancing.loads().items()})
        scalars = percentiles(layers) if self.show.percentiles else {}
        scalars |= by_layer(layers) if self.show.layers else {}
        # `train/`, where the reporters put the numbers of the same entry.
        room = f"train/{self.prefix}"
        image = load_image([load for _, load in layers]) if self.show.images and due else None
        table = extremes(layers) if self.show.tables and due else None
        return Shown(
            {room + name: value for name, value in scalars.items()},
            {} if image is None else {f"{room}load": image},
            {} if table is None else {f"{room}extremes": table},
        )


class _InFront(TrainerCallback):
    """Stands before the reporters and hands log entries to its owner, while the Trainer has it."""

    def __init__(self, owner: Reporting, handler: CallbackHandler) -> None:
        self.owner, self.handler = owner, handler

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if any(callback is self.owner for callback in self.handler.callbacks):
            self.owner.on_log(args, state, control, **kwargs)


def calling_trainer(callback: TrainerCallback) -> Any:
    """The Trainer that calls `callback` now, which no event names; None if called by hand."""
    handler, frame = None, sys._getframe().f_back
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and any(c is callback for c in caller.callbacks):
            handler = caller
        elif handler is not None:
            found = getattr(caller, "__dict__", {}).get("callback_handler") is handler
            return caller if found else None
        frame = frame.f_back
    return None


def resumed_folder(trainer: Any) -> Path | None:
    """The checkpoint that `trainer` was told to resume from as it trains now; None if unknown."""
    frame = sys._getframe().f_back if trainer is not None else None
    while frame is not None:
        named = frame.f_locals.get("resume_from_checkpoint")
        if frame.f_locals.get("self") is trainer and isinstance(named, str):
            return Path(named)
        frame = frame.f_back
    return None


def _lead(owner: Reporting) -> None:
    """Put a stand-in for `owner` before all other callbacks of the Trainer that calls it now."""
    trainer = calling_trainer(owner)
    if trainer is None:  # called by hand
        return
    handler = trainer.callback_handler
    others = [c for c in handler.callbacks if not (isinstance(c, _InFront) and c.owner is owner)]
    handler.callbacks = [_InFront(owner, handler), *others]  # a new list: this one is walked now
