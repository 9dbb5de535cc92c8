"""Ctrl-C between steps: the run ends after the step in progress, its log and checkpoints whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback


@contextmanager
def interrupt_between_steps(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C end the run after the step in progress; a second Ctrl-C ends it at once.

    Python may drop an interrupt at any other moment: one that falls into a finaliser is printed and
    forgotten.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return
    stop = _StopHere()
    trainer.add_callback(stop)
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _StopHere(TrainerCallback):
    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
