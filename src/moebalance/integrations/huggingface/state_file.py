"""The balancing state as one file next to a checkpoint's own files."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moebalance.core.handle import Balancing
from moebalance.files import writing

STATE_FILE = "moebalance.safetensors"
"""Name of the balancing state next to a checkpoint's own files."""


def save(balancing: Balancing, folder: str | Path, *, global_step: int | None = None) -> Path:
    """Write the balancing state into a checkpoint folder, whole or not at all.

    Args:
        balancing: the handle.
        folder: of the checkpoint.
        global_step: the trainer's step, if the handle has counted others before.
    """
    state = balancing.state_dict()
    if global_step is not None:
        state["global_step"] = global_step
    tensors = {
        f"{name}/{key}": tensor.cpu().contiguous()
        for name, layer in state.pop("layers").items()
        for key, tensor in layer.items()
    }
    path = Path(folder) / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with writing(path):
        save_file(tensors, partial, metadata={"moebalance": json.dumps(state)})
        os.replace(partial, path)
    return path


def load(
    balancing: Balancing,
    folder: str | Path,
    *,
    parents: Sequence[int | Sequence[int]] | None = None,
) -> None:
    """Take up the balancing state that `save` wrote into a checkpoint folder.

    Args:
        balancing: the handle on the model that goes on.
        folder: of the checkpoint.
        parents: where its experts are not those of the checkpoint, of which they descend; see
            `Balancing.load_state_dict`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, foreign, or does not fit.
    """
    balancing.load_state_dict(read(folder), parents=parents)


def read(folder: str | Path) -> dict[str, Any]:
    """What `save` wrote into a checkpoint folder, as `Balancing.state_dict` gave it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated or foreign.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"No balancing state at {path}: this checkpoint was saved without a BalanceCallback, "
            "or lies elsewhere; then give its folder as BalanceCallback(..., resume_from=...)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("moebalance")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): resume from an earlier checkpoint."
        ) from error
    if metadata is None:
        raise ValueError(f"{path} was not written by moebalance: it carries no description.")
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition("/")
        layers.setdefault(name, {})[leaf] = tensor
    try:
        described = dict(json.loads(metadata))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: its description cannot be read ({error or type(error).__name__}). "
            "Resume from an earlier checkpoint."
        ) from error
    return {**described, "layers": layers}
