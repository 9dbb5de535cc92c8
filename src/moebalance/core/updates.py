"""Optimizer steps of this process, whichever optimizer makes them."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class Listener(Protocol):
    """Who wants to hear of optimizer steps."""

    def saw_update(self, optimizer: Optimizer) -> None:
        """This optimizer is about to step."""


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def hear(listener: Listener) -> None:
    """Call `listener.saw_update` before each optimizer step, as long as the listener lives."""
    _watch()
    _listeners.add(listener)


@functools.cache
def _watch() -> None:
    # Before a step: an optimizer's own hooks, which may end a balancing step, run before those of
    # all optimizers.
    register_optimizer_step_pre_hook(_saw_update)


def _saw_update(optimizer: Optimizer, *_: Any) -> None:
    # A captured graph replays without this; compiled code must not depend on it.
    if torch.compiler.is_compiling():
        return
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if cuda and torch.cuda.is_current_stream_capturing():
        return
    for listener in list(_listeners):
        listener.saw_update(optimizer)
