"""Folders with weights: a run's own checkpoints, and the one that fine-tuning starts from."""

import hashlib
import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from moebalance.files import first_line
from moebalance.integrations.huggingface import STATE_FILE
from moebalance.integrations.huggingface.scan import files_of, read_table
from moebalance.integrations.huggingface.sharded import is_distributed, missing_part

logger = logging.getLogger(__name__)

_BLOCKS, _BLOCK_BYTES = 64, 16384


def checkpoint_folder(checkpoint: str) -> Path:
    """The folder of a model to fine-tune, once it is clear that it is one.

    Args:
        checkpoint: its path, from the current folder.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no model in it.
    """
    folder = Path(checkpoint)
    where = f"[model] checkpoint={checkpoint!r}"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{where}: there is no folder {folder.absolute()}. Give the folder of a model that "
            "Transformers saved, from where you stand; nothing is downloaded. `moebalance train` "
            "leaves one in runs/NAME/seed0/final."
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{where} holds a PEFT adapter, not a whole model: merge it into its base model "
            "(merge_and_unload, then save_pretrained) and give that folder."
        )
    if not (folder / "config.json").is_file():
        below = sorted(path.parent for path in folder.glob("*/config.json"))
        raise ValueError(
            f"{where}: {folder.absolute()} holds no config.json, so it is no model that "
            "Transformers saved." + (f" Did you mean {str(below[-1])!r}?" if below else "")
        )
    if not _weights(folder):
        raise ValueError(
            f"{where}: {folder.absolute()} holds a config.json but no weights (*.safetensors). "
            "Copy them there, or train from scratch with architecture = …"
        )
    return folder


def fingerprint(folder: Path) -> str:
    """Hex digest of a checkpoint: its configuration, and samples of its weights.

    Small files are read whole. Of a large file, blocks at even distances are read, so that 100 GB
    take less than a minute.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _weights(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_BLOCK_BYTES, size // _BLOCKS)):
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that can be read in full; None if there is none."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        problem = _damage(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("%s is not whole (%s): trying the one before.", checkpoint, problem)
    return None


def step_of(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was saved after; −1 for a folder of another name."""
    tail = checkpoint.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def _damage(checkpoint: Path) -> str | None:
    needed = ["trainer_state.json", "optimizer.pt", "scheduler.pt", STATE_FILE]
    weights = _weights(checkpoint)
    try:
        states = sorted(checkpoint.glob("rng_state*.pth"))  # one for each rank that there was
        if not states:
            return "rng_state.pth is missing"
        for problem in map(_unreadable, states):
            if problem:
                return problem
        if is_distributed(checkpoint):
            read_table(checkpoint / "trainer_state.json")
            return missing_part(checkpoint)
        for index in checkpoint.glob("*.index.json"):
            needed += files_of(index)
        for name in needed:
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
        if not weights:
            return "model.safetensors is missing"
        read_table(checkpoint / "trainer_state.json")
        for path in (*weights, checkpoint / STATE_FILE):
            with safe_open(path, framework="pt") as file:
                file.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            if problem := _unreadable(checkpoint / name):
                return problem
    except (
        OSError,
        KeyError,
        ValueError,
        SafetensorError,
    ) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def _unreadable(path: Path) -> str | None:
    """Why a file of torch cannot be read; reading is the test, and a truncated one fails."""
    try:
        with safe_globals():  # type: ignore[no-untyped-call]
            torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        return f"{path.name} cannot be read: {first_line(error)}"
    return None


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if path.name != STATE_FILE)
