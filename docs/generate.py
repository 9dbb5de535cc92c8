"""Write the parts of the documentation that follow from the code.

    python docs/generate.py

- docs/rooms.svg, from the imports in src/moebalance;
- the table of methods in README.md, from the classes that `moebalance.methods` exports.

A test fails while one of them is not up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from exported import lever
from rooms import draw, read_imports

from moebalance.methods import Method
from moebalance.words.methods import method_classes

ROOT = Path(__file__).parents[1]

_TABLE = re.compile(r"(?<=<!-- methods: python docs/generate\.py -->\n).*?(?=\n\n)", re.DOTALL)
_PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")


def picture() -> str:
    """The rooms of the library, as SVG."""
    return draw(read_imports(ROOT / "src" / "moebalance"))


def readme() -> str:
    """README.md with its table as it should be."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found, times = _TABLE.subn(lambda _: methods_table(), text)
    if times != 1:
        raise ValueError(f"README.md has {times} tables of methods under their comment, not 1.")
    return found


def methods_table() -> str:
    """Class, word, lever, first sentence and source of every method."""
    rows = [
        ("class", "word", "acts on", "in a sentence", "source"),
        ("---",) * 5,
        *(_row(word, kind) for word, kind in sorted(method_classes().items())),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(word: str, kind: type[Method]) -> tuple[str, ...]:
    summary = (kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    documented = f"{sys.modules[kind.__module__].__doc__} {kind.__doc__}"
    paper = _PAPER.search(documented)
    source = f"[{paper[1]}](https://arxiv.org/abs/{paper[1]})" if paper else "–"
    return f"`{kind.__name__}`", f"`{word}`", lever(kind), " ".join(summary.split()), source


if __name__ == "__main__":
    (ROOT / "docs" / "rooms.svg").write_text(picture(), encoding="utf-8")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
