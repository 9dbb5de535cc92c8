"""A Trainer that an exception ends tells nobody: the next training forward finds its loop gone."""

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn


def on_leaving(trainer: Any, model: nn.Module, left: Callable[[], None]) -> Callable[[], None]:
    """Call `left` before each training forward of `model` outside the loop that `trainer` is in.

    Args:
        trainer: one whose method calls this, however indirectly; None if nobody's does.
        model: what it trains.
        left: is called with the loop gone.

    Returns:
        What ends the watch.
    """
    loop = next((f.f_code for f in _stack() if f.f_locals.get("self") is trainer), None)
    if trainer is None or loop is None:
        return _nothing

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or module is not model:  # but a copy, which has this hook
            return
        if module.training and torch.is_grad_enabled() and not _runs(loop):
            left()

    return model.register_forward_pre_hook(before, prepend=True).remove


def _runs(code: CodeType) -> bool:
    """Whether this thread is within a call of `code`; about 5 µs under 40 calls."""
    return any(frame.f_code is code for frame in _stack())


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _nothing() -> None:
    pass
