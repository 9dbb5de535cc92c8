"""Refuse a site that would need the network, or that tells where it was built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

_LOADED = re.compile(
    r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|@import\s+[\"'(]|url\(\s*[\"']?((?:https?:)?//[^)\"']+)"
)


def faults(text: str, folder: str) -> Iterator[str]:
    """What a page or a style sheet must not have: things loaded from elsewhere, and the folder."""
    for match in _LOADED.finditer(text):
        yield f"loads {match[0]}"
    if folder in text:
        yield f"names {folder}"


def _check(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.format != "html":
        return
    root = str(Path(app.srcdir).parent)
    files = [f for f in Path(app.outdir).rglob("*") if f.suffix in (".html", ".css", ".js", ".md")]
    found = [f"{f}: {fault}" for f in files for fault in faults(f.read_text("utf-8"), root)]
    if found:
        raise ExtensionError("\n".join(found))


def setup(app: Sphinx) -> dict[str, bool]:
    """Look at all pages once they are written."""
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
