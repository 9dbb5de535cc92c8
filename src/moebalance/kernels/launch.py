"""Starting a Triton program: the one place where they are imported, compiled and run."""

from importlib import import_module
from typing import Any

import torch


def launch(program: str, device: torch.device, grid: int, *arguments: Any, **options: Any) -> None:
    """Start `program`, named by its file and itself, as so many blocks on this device."""
    file, _, name = program.partition(".")
    # Imported at the first launch: Triton is optional and slow to import.
    programs = import_module(f"moebalance.kernels.{file}")
    with torch.cuda.device(device if device.type == "cuda" else -1):
        getattr(programs, name)[(grid,)](*arguments, **options)
