"""Write docs/frameworks.md from the records of test runs: `python tests/peers/frameworks.py`.

`make frameworks` runs the tests against every release and then this.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDS, PAGE = ROOT / "build" / "frameworks", ROOT / "docs" / "frameworks.md"

HEAD = """\
# Frameworks and releases

What ran, on which release. `make frameworks` runs these tests and writes this page. All of them run
on processors, without a GPU; tests of several ranks use gloo. A release that is not here is refused
by name when you import the integration (Megatron-Core, torchtitan), or untested.
"""
TABLE = """
| framework | release | what ran | passed | skipped |
|---|---|---|---|---|
"""
FOOT = """
A skipped test is of something that the release does not have, such as quantile balancing before
Megatron-Core 0.19.
"""


def page(records: list[dict[str, Any]]) -> str:
    """The page, from one record for each framework and release.

    Raises:
        ValueError: a test failed.
    """
    rows = []
    for record in sorted(records, key=lambda r: (r["package"], _number(r["release"]))):
        for file, counts in sorted(record["files"].items()):
            if set(counts) - {"passed", "skipped"}:
                raise ValueError(f"{record['package']} {record['release']}, {file}: {counts}")
            cells = [record["package"], record["release"], _what(file)]
            numbers = [str(counts.get(kind, 0)) for kind in ("passed", "skipped")]
            rows.append(f"| {' | '.join([*cells, *numbers])} |\n")
    torch = {record["torch"] for record in records}
    return f"{HEAD}{TABLE}{''.join(rows)}{FOOT}torch {', '.join(sorted(torch))}.\n"


def _number(release: str) -> list[int]:
    return [int(part) for part in release.split(".") if part.isdigit()]


def _what(file: str) -> str:
    """The first sentence of a test file, without the framework's name."""
    text = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or file
    line = " ".join(text.split("\n\n")[0].split()).rstrip(".")
    return line.partition(": ")[2] or line


if __name__ == "__main__":
    found = [json.loads(file.read_text(encoding="utf-8")) for file in RECORDS.glob("*.json")]
    PAGE.write_text(page(found), encoding="utf-8")
