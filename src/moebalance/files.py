"""Files, with errors that name the path and the cause."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

MOST_DEEP = 100
"""Lists within lists that a line of JSON may have; a log of ours has five."""

_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_OPENS = b"[{"
# What torch and safetensors say when a disk takes no more; they name neither file nor cause.
_WRITE_FAILED = re.compile(
    r"no space left|disk quota|file too large|os error (?:27|28|122)\b|inline_container|"
    r"PytorchStreamWriter|file write failed",
    re.IGNORECASE,
)


def loads(line: str | bytes, **options: Any) -> Any:
    """`json.loads`, which refuses in words what is nested too deeply.

    Raises:
        ValueError: it is no JSON, or nested more than `MOST_DEEP` times.
    """
    data = line if isinstance(line, bytes) else line.encode("utf-8", "replace")
    depth = deepest = 0
    for bracket in data.translate(None, _OTHERS):
        depth += 1 if bracket in _OPENS else -1
        deepest = max(depth, deepest)
    if deepest > MOST_DEEP:
        raise ValueError(f"nested {deepest} deep, and at most {MOST_DEEP} is read")
    return json.loads(line if isinstance(line, str) else line.decode("utf-8"), **options)


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Name the file and the cause if it cannot be written, whoever writes it.

    Raises:
        OSError: with the path as its `filename`; also in place of what torch or safetensors raise.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        if not _WRITE_FAILED.search(str(error)):
            raise
        number, words = _cause(error, Path(path))
        raise OSError(number, words, str(path)) from error


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all; its folder is made if missing.

    Raises:
        OSError: names the path and the cause.
    """
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Write a file whole or not at all; its folder is made if missing.

    Raises:
        OSError: names the path and the cause.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # such as /dev/stdout
        with writing(path):
            path.write_bytes(content)
        return path
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}")
    try:
        with writing(path):
            partial.write_bytes(content)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__


def _cause(error: Exception, path: Path) -> tuple[int, str]:
    """The number and the words of what kept a file from being written."""
    said = first_line(error)
    if found := re.search(r"(?:os error|Errno) (\d+)", said):
        return int(found[1]), os.strerror(int(found[1]))
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    try:  # the same again, where the system says why
        with TemporaryFile(dir=there) as probe:
            probe.write(bytes(2**20))
    except OSError as cause:
        return cause.errno or errno.EIO, os.strerror(cause.errno or errno.EIO)
    free = shutil.disk_usage(there).free
    return errno.EIO, f"Cannot be written, with {free / 1e6:.0f} MB free on its disk ({said[:200]})"
