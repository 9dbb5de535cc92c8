"""Checkpoints of a run: the newest one that is whole."""

import json
import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from moebalance.integrations.huggingface import STATE_FILE

logger = logging.getLogger(__name__)


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
    """What is wrong with a checkpoint; None if it is whole."""
    needed = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE_FILE)
    for name in needed:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for name in ("model.safetensors", STATE_FILE):
            with safe_open(checkpoint / name, framework="pt") as file:
                file.keys()
        # Reading is the test: a truncated archive raises here.
        torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        return f"{type(error).__name__}: {error}"
    return None
