"""README, CONTRIBUTING and the pages of docs/: their code, commands, headings, links and tables.

Python blocks of a page run in order in one namespace. One that cannot says so in a comment above:

    <!-- run by: tests/peers/test_lightning_runs.py -->    a test of its own runs it
    <!-- not run: needs LLaMA-Factory -->                  it is only compiled, and why

A table under `<!-- rows of: demo.md#mixed-micro-batches -->` is held to the page that it is from.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[a-z ]+): (?P<about>[^>]*?) -->\n)?"
    r"^(?P<fence>```+)(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
_COPIED = re.compile(r"<!-- rows of: (\S+?)#(\S+) -->\n((?:\|.*\n)+)")
_LINK = re.compile(r"\]\(([^()\s]+)\)")


class Block(NamedTuple):
    """A fenced block: where its code begins, in which language, and how it is marked."""

    page: Path
    line: int
    language: str
    code: str
    mark: str
    about: str

    @property
    def name(self) -> str:
        """Page and line, as an editor takes them."""
        return f"{name_of(self.page)}:{self.line}"

    def compiled(self) -> object:
        """The code, whose errors point into the page."""
        return compile(
            "\n" * (self.line - 1) + self.code, str(self.page), "exec", dont_inherit=True
        )


def name_of(page: Path) -> str:
    """The page's path from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """All fenced blocks of a page in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            1 + text.count("\n", 0, match.start("code")),
            match["language"],
            match["code"],
            match["mark"] or "",
            match["about"] or "",
        )
        for match in _FENCE.finditer(text)
        if match["language"] in languages
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `moebalance` of every call in the page's blocks of shell."""
    for block in blocks(page, "bash", "console"):
        for line in block.code.splitlines():
            if block.language == "bash" or line.startswith("$ "):
                yield from _calls(line.removeprefix("$ "))


def mentions(page: Path) -> Iterator[list[str]]:
    """The same of every call that the text names, which may leave out its arguments."""
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if "moebalance" in code:
            yield from _calls(code)


def _calls(line: str) -> Iterator[list[str]]:
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        first = place == 0 or words[place - 1] == "-m"
        if first and word in ("moebalance", ".venv/bin/moebalance") and words[place + 1 :]:
            yield words[place + 1 :]


def headings(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {_anchor(title) for title in titles}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """File and anchor of every link that stays in the repository."""
    for target in _LINK.findall(prose(page)):
        if not target.startswith(("http:", "https:")):
            file, _, anchor = target.partition("#")
            yield ((page.parent / file).resolve() if file else page), anchor


def copied(page: Path) -> Iterator[tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """Tables whose rows are taken from another page, each with the table that they are from."""
    for file, anchor, text in _COPIED.findall(page.read_text(encoding="utf-8")):
        yield _rows(text), table((page.parent / file).resolve(), anchor)


def table(page: Path, anchor: str) -> list[dict[str, str]]:
    """Rows of the tables under a heading of the page, by the names of their columns."""
    sections = re.split(r"^#+ ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    (section,) = (s for s in sections if _anchor(s.partition("\n")[0]) == anchor)
    return _rows(section)


def _rows(text: str) -> list[dict[str, str]]:
    found = []
    for block in re.findall(r"(?:^\|.*(?:\n|$))+", text, flags=re.MULTILINE):
        head, _, *rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()
        ]
        found += [dict(zip(head, row, strict=True)) for row in rows]
    return found


def _anchor(title: str) -> str:
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
