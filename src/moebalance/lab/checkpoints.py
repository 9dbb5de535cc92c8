"""Folders with weights: a run's own checkpoints, and the one that fine-tuning starts from."""

import hashlib
import logging
from pathlib import Path

from moebalance.lab.damage import damage, step_of, weight_files

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
    if not weight_files(folder):
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
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(_BLOCK_BYTES, size // _BLOCKS)):
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that a run can go on from; None if there is none."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        logger.warning("%s is not whole (%s): trying the one before.", checkpoint, problem)
    return None
