"""Starts a Triton program: only here are they imported, compiled and run."""

from functools import cache
from importlib import import_module
from typing import Any

import torch


def launch(
    program: str, grid: int, tensors: tuple[torch.Tensor, ...], *numbers: float, **options: Any
) -> None:
    """Start a Triton program on the device of its tensors.

    Args:
        program: file and function, for example "programs.choose".
        grid: number of blocks.
        tensors: the first arguments.
        numbers: the next arguments. Each keeps one type; integers are not specialised on.
        options: compile-time arguments and Triton's own compile options.
    """
    device = tensors[0].device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        _start(program, device, grid, tensors, numbers, options)
    else:
        with torch.cuda.device(device):
            _start(program, device, grid, tensors, numbers, options)


def _start(
    program: str,
    device: torch.device,
    grid: int,
    tensors: tuple[torch.Tensor, ...],
    numbers: tuple[float, ...],
    options: dict[str, Any],
) -> None:
    # Triton looks up compiled programs by every property of every argument. On the host this takes
    # longer than the work on the device. Here only dtypes and alignment can change.
    dtypes = [tensor.dtype for tensor in tensors]
    aligned = [tensor.data_ptr() % 16 == 0 for tensor in tensors]
    key = (program, device, *options.values(), *dtypes, *aligned)
    known = _compiled.get(key)
    if known is not None:
        compiled, constants = known
        compiled[(grid, 1, 1)](*tensors, *numbers, *constants)
        return
    function = _program(program)
    compiled = function[(grid,)](*tensors, *numbers, **options)
    if compiled is not None:  # the interpreter compiles nothing
        constants = [options[name] for name in function.arg_names if name in options]
        _compiled[key] = compiled, constants


_compiled: dict[Any, tuple[Any, list[Any]]] = {}
"""Compiled programs by key, with the values of their compile-time arguments."""


@cache
def _program(name: str) -> Any:
    """Imported at the first launch: Triton is optional and slow to import."""
    file, _, function = name.partition(".")
    return getattr(import_module(f"moebalance.kernels.{file}"), function)
