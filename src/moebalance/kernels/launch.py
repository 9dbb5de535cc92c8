"""Starting a Triton program: the one place where they are imported, compiled and run."""

from functools import cache
from importlib import import_module
from typing import Any

import torch


def launch(program: str, device: torch.device, grid: int, *arguments: Any, **options: Any) -> None:
    """Start `program`, named by its file and itself, as so many blocks on this device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        _start(program, device, grid, arguments, options)
    else:
        with torch.cuda.device(device):
            _start(program, device, grid, arguments, options)


def _start(
    program: str,
    device: torch.device,
    grid: int,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    # Triton looks up what it has compiled by every property of every argument, which takes the host
    # longer than the work takes the device. Here dtypes and alignment are all that can change.
    kinds = [
        (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, torch.Tensor) else type(a)
        for a in arguments
    ]
    key = (program, device, *options.values(), *kinds)
    if key in _compiled:
        compiled, constants = _compiled[key]
        compiled[(grid, 1, 1)](*arguments, *constants)
        return
    function = _program(program)
    compiled = function[(grid,)](*arguments, **options)
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
