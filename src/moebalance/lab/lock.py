"""One process at a time in a run's folder."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none, and no run there is kept from another
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""File in a run's folder; it stays, and holds who was there last."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the system lets go when this one ends, however it ends.

    Raises:
        ValueError: another process is there; names the folder and the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"{folder} is in use by {file.read().strip() or 'another process'}: wait until "
                    "that run has ended, end it, or choose another folder (--out)."
                ) from None
            except OSError:
                pass  # a file system without locks
        with suppress(OSError):  # a full disk says so later, where it matters
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
