"""Build each client's environment in `.venv-clients`: `python tests/clients/build.py`.

It sees the packages of the environment that runs this, as `.venv-peers` does. What a client pins
otherwise, or needs more, is in its `.txt` file and hides what is seen.
"""

import site
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
PLACE = HERE.parents[1] / ".venv-clients"
CLIENTS = ("llamafactory", "swift", "axolotl", "newest")
"""The last one is the newest release of Transformers alone."""

TORCHAUDIO = (
    '"""LLaMA-Factory imports torchaudio for sound, and its wheel wants CUDA: not needed."""\n'
)


def build(client: str) -> None:
    """Make the environment of one client, unless it is there and as its file says."""
    place, wanted = PLACE / client, HERE / f"{client}.txt"
    mark = place / ".ready"
    if mark.exists() and mark.read_text("utf-8") == wanted.read_text("utf-8"):
        return
    venv.create(place, with_pip=True, clear=True)
    python = place / "bin" / "python"
    (packages,) = place.glob("lib/python*/site-packages")
    line = f"import site; site.addsitedir({site.getsitepackages()[0]!r})\n"
    (packages / "moebalance.pth").write_text(line, encoding="utf-8")
    if client == "llamafactory":
        (packages / "torchaudio.py").write_text(TORCHAUDIO, encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement"]
    subprocess.run([*install, str(wanted)], check=True)
    mark.write_text(wanted.read_text("utf-8"), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or CLIENTS:
        build(name)
