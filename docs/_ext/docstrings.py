"""Docstrings are written as Markdown is; Sphinx reads reStructuredText. Three things differ.

|x| is an absolute value and no substitution, `Name`s may follow code without a space, and an
indented block after a paragraph is a formula and no quotation.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx


def to_restructured(lines: list[str]) -> list[str]:
    """The same docstring, for Sphinx. Examples are left as they are."""
    found: list[str] = []
    paragraph = example = formula = False
    for line in lines:
        indented = line.startswith("    ") or not line
        if line.startswith("    ") and paragraph and found[-1] == "":
            found += ["::", ""]
            formula = True
        formula = formula and indented
        example = line.lstrip().startswith(">>>") or (example and bool(line))
        if line:
            paragraph = not (line.startswith(" ") or example)
        if not (formula or example):
            line = re.sub(r"(`[^`]+`)(?=\w)", r"\1\ ", line.replace("|", r"\|"))
        found.append(line)
    return found


def _process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_restructured(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Run before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
