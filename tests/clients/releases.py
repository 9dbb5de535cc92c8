"""Run `release_checks.py` under every release of Transformers that is in an environment here.

    python tests/clients/releases.py

`make clients` does so at its end. What was found stays in releases.json and is a table of
docs/clients.md.
"""

import json
import os
import subprocess
import sys
from typing import Any

import run

HERE, ROOT = run.HERE, run.ROOT
FOUND = HERE / "releases.json"
PLACES = ("here", *run.CLIENTS, "newest")


def check(place: str) -> dict[str, Any]:
    """What one environment says."""
    inside = run.ENVIRONMENTS / place / "bin" / "python"
    python = sys.executable if place == "here" else str(inside)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    program = [python, str(HERE / "release_checks.py")]
    done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(places: list[str]) -> None:
    """Check these environments, keep what was found and write the page."""
    found = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    for place in places:
        found[place] = check(place)
        print(place, found[place], flush=True)
        FOUND.write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")
    run.write_page()


if __name__ == "__main__":
    main(sys.argv[1:] or list(PLACES))
