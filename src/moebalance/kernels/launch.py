"""Starts a Triton program: only here are they imported, compiled and run."""

from collections.abc import Hashable
from functools import cache
from importlib import import_module
from typing import Any

import torch


class Program:
    """A Triton program with its compile-time arguments, and what was compiled of it.

    Args:
        name: file and function, for example "programs.choose".
        options: compile-time arguments and Triton's own compile options.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options = name, options
        self._compiled: dict[Hashable, Any] = {}
        self._constants: list[Any] = []

    def start(
        self, grid: int, tensors: tuple[torch.Tensor, ...], numbers: tuple[float, ...]
    ) -> None:
        """Start it on the current device."""
        # Triton looks up compiled programs by every property of every argument. On the host this
        # takes longer than the work on the device. Here only these can change.
        device = tensors[0].device
        key = (device, *[x.dtype for x in tensors], *[x.data_ptr() % 16 == 0 for x in tensors])
        known = self._compiled.get(key)
        if known is not None:
            known[(grid, 1, 1)](*tensors, *numbers, *self._constants)
            return
        function = _function(self.name)
        compiled = function[(grid,)](*tensors, *numbers, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            names = [name for name in function.arg_names if name in self.options]
            self._constants = [self.options[name] for name in names]
            self._compiled[key] = compiled


def launch(program: Program, grid: int, tensors: tuple[torch.Tensor, ...], *numbers: float) -> None:
    """Start a program on the device of its tensors.

    Args:
        program: the program.
        grid: number of blocks.
        tensors: the first arguments.
        numbers: the next arguments. Each keeps one type; integers are not specialised on.
    """
    device = tensors[0].device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        program.start(grid, tensors, numbers)
    else:
        with torch.cuda.device(device):
            program.start(grid, tensors, numbers)


@cache
def _function(name: str) -> Any:
    """Imported at the first launch: Triton is optional and slow to import."""
    file, _, function = name.partition(".")
    return getattr(import_module(f"moebalance.kernels.{file}"), function)
