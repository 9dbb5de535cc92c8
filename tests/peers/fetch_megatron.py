"""Unpack the Python files of Megatron-Core releases that pip has no wheel of for this Python.

`python tests/peers/fetch_megatron.py FOLDER VERSION...` makes FOLDER/VERSION/megatron/core. What is
compiled in a wheel stays out of it; Megatron-Core needs that for its data sets alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = ("--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp")
PLATFORM = "--platform=manylinux_2_28_x86_64"


def fetch(version: str, folder: Path) -> None:
    """Make `folder`/`version`, unless it is there."""
    target = folder / version
    if target.exists():
        return
    pip = [sys.executable, "-m", "pip", "download", "--quiet", *WHEEL, PLATFORM]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, f"--dest={scratch}", f"megatron-core=={version}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("megatron/core/") and name.endswith(".py"):
                    archive.extract(name, target)


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        fetch(wanted, Path(sys.argv[1]))
