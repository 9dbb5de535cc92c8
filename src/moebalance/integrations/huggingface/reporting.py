"""Complete a Trainer's log entries before its reporters read them.

A Trainer calls its reporters (TensorBoard, W&B, …) before the callbacks that it is given, and tells
a callback nothing of the others. So a callback that adds metrics takes a place in front of them,
for log entries alone: every other event stays in the order of the Trainer.
"""

import sys
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler


class Reporting(TrainerCallback):
    """A callback that adds metrics to training log entries, for every reporter of the Trainer."""

    _completed: dict[str, Any] | None = None

    def complete(self, state: Any, logs: dict[str, Any]) -> None:
        """Add the metrics to one training log entry."""
        raise NotImplementedError

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place in front."""
        _lead(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the place in front, if this callback was added after the Trainer was made."""
        _lead(self)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the metrics to a training log entry, once."""
        if logs is None or "loss" not in logs or logs is self._completed:
            return
        self._completed = logs
        self.complete(state, logs)


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


def _lead(owner: Reporting) -> None:
    """Put a stand-in for `owner` before all other callbacks of the Trainer that calls it now."""
    trainer = calling_trainer(owner)
    if trainer is None:  # called by hand
        return
    handler = trainer.callback_handler
    others = [c for c in handler.callbacks if not (isinstance(c, _InFront) and c.owner is owner)]
    handler.callbacks = [_InFront(owner, handler), *others]  # a new list: this one is walked now
