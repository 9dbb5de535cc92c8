"""Read a distributed checkpoint without running code that it may hold.

Torch unpickles the table of contents (`.metadata`) and every value that is no tensor, and a pickle
can call any function. Here the table may name the classes that torch writes into it and nothing
else, and values are read by `torch.load(…, weights_only=True)`.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moebalance.files import writing

_NAMES: Mapping[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch": frozenset({"Size", "device"}),
    "collections": frozenset({"OrderedDict"}),
    # Where the checkpoint was saved. From Python 3.13 on the classes lie in a module of their own.
    "pathlib": frozenset({"PosixPath", "PurePosixPath"}),
    "pathlib._local": frozenset({"PosixPath", "PurePosixPath"}),
}
"""What torch writes into a table of contents, by module."""

_BROKEN = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
"""What reading a damaged or hostile pickle may raise."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which has no place in a table of contents"
        )


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = read_contents(Path(self.path))
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # Torch would load `value` by pickle. It gets what was read safely, saved anew.
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)


def read_contents(folder: Path) -> Metadata:
    """Read the table of contents of a distributed checkpoint.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or holds what torch does not write.
    """
    path = folder / ".metadata"
    with path.open("rb") as file:
        try:
            found = _Unpickler(file).load()
            if not isinstance(found, Metadata):
                raise TypeError(f"it is {type(found).__name__}, not a table of contents")
            for part in found.storage_data.values():
                _check_place(part)
        except _BROKEN as error:
            raise ValueError(f"{path} is refused: {error or type(error).__name__}") from error
    return found


def _check_place(part: Any) -> None:
    """Refuse a place that is not a part of a file in the checkpoint's own folder."""
    name, numbers = part.relative_path, (part.offset, part.length)
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"it places a tensor in {str(name)[:80]!r}, outside of its folder")
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"it places a tensor at {str(numbers)[:80]} of {name}")


def save_parts(parts: dict[str, Any], folder: Path) -> None:
    """Save a distributed checkpoint; all ranks together.

    Raises:
        OSError: it cannot be written; names the folder and the cause.
    """
    with writing(folder):
        try:
            save(parts, checkpoint_id=folder)
        except CheckpointException as error:
            raise RuntimeError(_causes(error)) from error


def load_parts(parts: dict[str, Any], folder: Path) -> None:
    """Load a distributed checkpoint into `parts`, in place; all ranks together.

    Raises:
        ValueError: it is damaged, does not fit, or holds what torch does not write.
    """
    read_contents(folder)  # for its own words, before torch wraps them
    try:
        load(parts, storage_reader=_Reader(folder), planner=_Planner())
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be loaded: {_causes(error)}") from error


def _causes(error: CheckpointException) -> str:
    words = (str(cause).splitlines() for cause, _ in error.failures.values())
    return "; ".join(sorted({lines[0] for lines in words if lines}))
