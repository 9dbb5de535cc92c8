"""Starting a Triton program: the one place where they are imported, compiled and run."""

from functools import cache
from importlib import import_module
from typing import Any

import torch


def launch(
    program: str, grid: int, tensors: tuple[torch.Tensor, ...], *numbers: float, **options: Any
) -> None:
    """Start a Triton program on the device of its tensors.

    Args:
        program: its file and itself, "programs.choose".
        grid: number of blocks.
        tensors: its first arguments.
        numbers: the arguments after those, of one type each and, if whole, not specialised on.
        options: its compile-time arguments, and what Triton compiles it with.
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
    # Triton looks up what it has compiled by every property of every argument, which takes the host
    # longer than the work takes the device. Here dtypes and alignment are all that can change.
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
"""Programs by what they were compiled for, with the values of their compile-time arguments."""


@cache
def _program(name: str) -> Any:
    """Imported at the first launch: Triton is optional and slow to import."""
    file, _, function = name.partition(".")
    return getattr(import_module(f"moebalance.kernels.{file}"), function)
