"""Which kind of trace a file is, by its content."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moebalance.files import first_line, loads
from moebalance.lab.traces.load import Missing
from moebalance.lab.traces.logits import KEY as LOGITS
from moebalance.lab.traces.logits import holds_logits, read_logits
from moebalance.lab.traces.megatron import PATTERN, read_megatron
from moebalance.lab.traces.rollouts import KEY, holds_rollouts, lines_of, read_rollouts
from moebalance.lab.traces.sidecars import trace_of
from moebalance.runlog import LOG_NAME, Run

_ARRAYS, _TENSORS = (".npy", ".npz"), (".pt", ".pth", ".safetensors")
_KNOWN = (
    f"known are router traces of Megatron-Core (JSONL), {KEY} of rollouts (.jsonl, .npy, .npz, "
    f".pt, .safetensors) and {LOGITS} of Transformers (.pt, .safetensors)"
)


class Traces(NamedTuple):
    """Runs read from traces, and what to tell about how they were read."""

    runs: list[Run]
    notes: list[str]


def is_trace(path: Path) -> bool:
    """Whether this is another tool's trace, or a folder of Megatron's; by name and first line."""
    if path.is_dir():
        # A folder with a run log is a folder of runs.
        return next(path.rglob(LOG_NAME), None) is None and any(path.glob(PATTERN))
    if not path.is_file() or path.name == LOG_NAME:
        return False
    if trace_of(path) is not None:
        return True  # refused with the name of its trace
    if path.suffix == ".jsonl":
        first = _first_row(path)
        return "top_indices" in first or holds_rollouts(first)
    return path.suffix in _ARRAYS or path.suffix in _TENSORS


def find_traces(path: Path, missing: Missing) -> Traces:
    """Read a trace.

    Args:
        path: a file, or a folder with the files of Megatron's ranks.
        missing: what the trace does not say.

    Raises:
        ValueError: it is no trace, is damaged, or does not say what is needed; names the file.
    """
    try:
        run, note = _read(path, missing)
    except OSError:
        raise
    except Exception as error:  # a file from elsewhere may hold anything
        if not isinstance(error, ValueError):
            raise ValueError(f"{path} cannot be read as a trace: {first_line(error)}") from error
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    return Traces([run], [note] if note else [])


def _read(path: Path, missing: Missing) -> tuple[Run, str]:
    if path.is_dir():
        return read_megatron(sorted(path.glob(PATTERN)), missing)
    if path.suffix == ".jsonl":
        if "top_indices" in _first_row(path):
            return read_megatron([path], missing)
        return read_rollouts(path, lines_of(path), missing)
    if (trace := trace_of(path)) is not None:
        raise ValueError(
            f"{path} belongs to a router trace of Megatron-Core and says no choices: give "
            f"{trace}, or the folder. What is next to the trace is read with it."
        )
    held = _held(path)
    if holds_rollouts(held):
        return read_rollouts(path, iter([held]), missing)
    if holds_logits(held.get(LOGITS)):
        return read_logits(path, held, missing)
    raise ValueError(f"{path} holds {', '.join(map(str, list(held)[:5])) or 'nothing'}; {_KNOWN}")


def _held(path: Path) -> Mapping[str, Any]:
    """What a file of arrays holds, by name."""
    try:
        held = _opened(path)
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) or "allow_pickle" in str(error):
            raise ValueError(
                f"{path} holds objects that are not loaded for safety. Save {_saved_as(path)}"
            ) from None
        raise ValueError(f"{path} is damaged: {first_line(error)}") from error
    if isinstance(held, Mapping):
        return held
    return {LOGITS: held} if isinstance(held, (list, tuple)) else {KEY: held}


def _saved_as(path: Path) -> str:
    """What to save in place of objects, with an example."""
    if path.suffix in _ARRAYS:
        return f'an array of integers, for example np.save("{path.stem}.npy", {KEY})'
    return f'tensors alone, for example torch.save({{"{LOGITS}": out.{LOGITS}}}, "{path.name}")'


def _opened(path: Path) -> Any:
    if path.suffix in _ARRAYS:
        import numpy as np

        with path.open("rb") as file:
            # NumPy takes any other beginning for a pickle, and says how to load one.
            if not file.read(6).startswith((b"\x93NUMPY", b"PK")):
                raise ValueError("it does not begin as NumPy's files do")
            file.seek(0)
            found = np.load(file, allow_pickle=False)
            return dict(found) if isinstance(found, Mapping) else {KEY: found}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _gathered(load_file(path))
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _gathered(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """`router_logits.0`, `router_logits.1`, … as one list, in the order of their numbers."""
    names = [name for name in tensors if re.fullmatch(rf"{LOGITS}\.\d+", name)]
    names.sort(key=lambda name: int(name.rsplit(".", 1)[1]))
    rest = {name: tensor for name, tensor in tensors.items() if name not in names}
    return {**rest, LOGITS: [tensors[name] for name in names]} if names else rest


def _first_row(path: Path) -> Mapping[str, Any]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        line = next((line for line in lines if line.strip()), "")
    try:
        row = loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
