"""Starting a Triton program: the one place where they are imported, compiled and run."""

from functools import cache
from importlib import import_module
from typing import Any

import torch


def launch(program: str, device: torch.device, grid: int, *arguments: Any, **options: Any) -> None:
    """Start `program`, named by its file and itself, as so many blocks on this device."""
    start = _program(program)[(grid,)]
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        start(*arguments, **options)
    else:
        with torch.cuda.device(device):
            start(*arguments, **options)


@cache
def _program(name: str) -> Any:
    """Imported at the first launch: Triton is optional and slow to import."""
    file, _, function = name.partition(".")
    return getattr(import_module(f"moebalance.kernels.{file}"), function)
