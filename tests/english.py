"""Which words the README, the pages of docs/ and the public docstrings are written in.

    python tests/english.py [ROOT]

prints how often each construction occurs in 10,000 words. Code, formulas and tables' rules are left
out; a docstring is public if nothing on its way has a name that begins with an underscore.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

CONSTRUCTIONS = {
    "shall": r"shall",
    "beside(s)": r"besides?",
    "those that / that of": r"those that|that of",
    "what the / what is": r"what (?:the|is)",
    "for example / such as": r"for example|such as",
    "you(r)": r"your?",
}
"""Whole words, in any case. The first three have no place here; see CONTRIBUTING.md."""

AVOIDED = ("shall", "beside(s)", "those that / that of")

_NO_PROSE = re.compile(
    r"^(```+).*?^\1$"  # fenced blocks
    r"|<!--.*?-->"
    r"|\$\$.*?\$\$|\$[^$\n]+\$"
    r"|`[^`\n]+`"
    r"|\]\([^)\s]*\)"  # where a link leads; its words stay
    r"|^>>> .*$|^\.\.\. .*$",
    re.DOTALL | re.MULTILINE,
)


def pages(root: Path) -> list[Path]:
    """README, CONTRIBUTING and docs/ in Markdown."""
    own = [root / name for name in ("README.md", "CONTRIBUTING.md")]
    return [*filter(Path.exists, own), *sorted((root / "docs").rglob("*.md"))]


def modules(root: Path) -> list[Path]:
    """The public modules of the library."""
    found = sorted((root / "src").rglob("*.py"))
    return [file for file in found if not re.search(r"/_(?!_init__)", file.as_posix())]


def prose(file: Path) -> str:
    """The words of a page, or the public docstrings of a module."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        text = "\n\n".join(_docstrings(ast.parse(text)))
    return _NO_PROSE.sub(" ", text)


def occurrences(text: str, construction: str) -> list[str]:
    """Each occurrence of a construction, with the words around it."""
    pattern = rf"(?i)[^\n]{{0,30}}\b(?:{CONSTRUCTIONS[construction]})\b[^\n]{{0,30}}"
    return [match[0].strip() for match in re.finditer(pattern, re.sub(r"\s+", " ", text))]


def count(texts: Iterable[str]) -> tuple[int, Counter[str]]:
    """The number of words, and how often each construction occurs."""
    words, found = 0, Counter[str]()
    for text in texts:
        words += len(re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text))
        flat = re.sub(r"\s+", " ", text)
        for name, pattern in CONSTRUCTIONS.items():
            found[name] += len(re.findall(rf"(?i)\b(?:{pattern})\b", flat))
    return words, found


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Of a module, and of what is public in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(node) or ""
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            name = getattr(child, "name", "_")
            if not name.startswith("_"):
                yield from _docstrings(child)


def main(root: Path) -> None:
    """Print the table."""
    words, found = count(prose(file) for file in [*pages(root), *modules(root)])
    print(f"{words} words; occurrences in 10,000:\n")
    print(f"| {' | '.join(CONSTRUCTIONS)} |\n|{'---:|' * len(CONSTRUCTIONS)}")
    print(f"| {' | '.join(f'{1e4 * found[name] / words:.1f}' for name in CONSTRUCTIONS)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1])
