"""Text that every Python ships: four clearly different domains, offline, nothing bundled.

| domain | what it is |
|---|---|
| `code`   | standard-library source without docstrings and without comment lines |
| `prose`  | the docstrings of the standard library and the language reference of `pydoc` |
| `tables` | character maps of `encodings` and the entity table of HTML |
| `names`  | the Unicode character database: code point, name, category |

The text depends on the Python version, never on the machine: packages that distributions leave out
(tests, tkinter, idlelib, …) and files written at build time are not read, so two builds of the same
version give the same documents. What a run trained on is pinned by the corpus hash in its header.
"""

from __future__ import annotations

import html.entities
import re
import sysconfig
import unicodedata
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

DOMAINS = ("code", "prose", "tables", "names")

# Left out by some distribution, written when Python was built, or the source of another domain.
_SKIPPED_PARTS = {
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "test", "tests", "idlelib"),
    *("turtledemo", "lib2to3", "distutils", "tkinter", "ensurepip", "venv", "macholib"),
    *("encodings", "pydoc_data"),
}
_SKIPPED_FILES = ("_sysconfig", "_distutils", "sitecustomize", "usercustomize", "entities")

# A triple-quoted string that opens a module or follows the colon of a definition. A regular
# expression and not `ast`: parsing 8 MB takes six seconds, this a fifth of one.
_DOCSTRING = re.compile(
    r"(?P<before>\A(?:[ \t]*(?:#[^\n]*)?\n)*|:[ \t]*(?:#[^\n]*)?\n(?:[ \t]*\n)*)[ \t]*"
    r"[rRuU]?(?P<quote>\"\"\"|''')(?P<text>.*?)(?P=quote)[^\n]*",
    re.DOTALL,
)
_COMMENT_LINE = re.compile(r"^[ \t]*#[^\n]*\n", re.MULTILINE)

_MIN_PROSE_CHARACTERS = 200
_CODE_POINTS_PER_DOCUMENT = 256


def python_text(domains: tuple[str, ...] = DOMAINS) -> dict[str, dict[str, str]]:
    """Read the running Python's own text, as domain → document name → text.

    Args:
        domains: Which of :data:`DOMAINS` to read.

    Returns:
        One mapping a domain; names are unique within the domain and sorted.

    Raises:
        ValueError: The standard library is not a folder of `.py` files (a frozen or zipped
            Python).

    >>> text = python_text(("names",))
    >>> text["names"]["U+0000"].splitlines()[60 - 0x20]
    '003C LESS-THAN SIGN Sm'
    """
    text: dict[str, dict[str, str]] = {}
    if {"code", "prose"} & set(domains):
        text["code"], text["prose"] = _code_and_prose(_standard_library())
    if "tables" in domains:
        text["tables"] = dict(_tables(_standard_library()))
    if "names" in domains:
        text["names"] = dict(_names())
    return {domain: text[domain] for domain in domains}


def split_docstrings(source: str) -> tuple[str, str]:
    '''Separate Python source into code and documentation.

    Returns:
        The code without docstrings and whole-line comments; the docstrings, a blank line between.

    >>> split_docstrings('def f(x):\\n    """Double."""\\n    # see g\\n    return 2 * x\\n')
    ('def f(x):\\n    return 2 * x\\n', 'Double.')
    '''
    docstrings = [cleandoc(found["text"]) for found in _DOCSTRING.finditer(source)]
    code = _DOCSTRING.sub(lambda found: found["before"].rstrip("\n"), source)
    return _COMMENT_LINE.sub("", code).lstrip("\n"), "\n\n".join(filter(None, docstrings))


def _standard_library() -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "argparse.py").is_file():
        raise ValueError(
            f'source="python" needs the standard library as .py files, and {str(root)!r} holds '
            "none (a frozen or zipped Python). Give the path of a text file or folder as source."
        )
    return root


def _code_and_prose(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    code, prose = {}, {}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if _SKIPPED_PARTS.intersection(place.parts) or place.name.startswith(_SKIPPED_FILES):
            continue
        program, documentation = split_docstrings(_read(path))
        if program.strip():
            code[place.as_posix()] = program
        if len(documentation) >= _MIN_PROSE_CHARACTERS:
            prose[place.as_posix()] = documentation + "\n"
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some minimal distributions
        return code, prose
    return code, prose | {f"topics/{name}": text for name, text in sorted(topics.items())}


def _tables(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "encodings").glob("*.py")):
        text = _read(path)
        # The maps begin below the codec classes, which are the same dozen lines in every file.
        start = text.find("decoding_table = (")
        start = text.find("decoding_map = ") if start < 0 else start
        if start >= 0:
            yield f"encodings/{path.name}", text[start:]
    rows = [f"&{name}\t{text}\n" for name, text in sorted(html.entities.html5.items())]
    for start in range(0, len(rows), 256):
        yield f"html5/{start:04d}", "".join(rows[start : start + 256])


def _names() -> Iterator[tuple[str, str]]:
    for start in range(0, 0x20000, _CODE_POINTS_PER_DOCUMENT):
        rows = []
        for point in range(start, start + _CODE_POINTS_PER_DOCUMENT):
            name = unicodedata.name(chr(point), "")
            # Names made by rule (… IDEOGRAPH-4E00, HANGUL SYLLABLE GA) would be nine in ten.
            if name and not name.endswith(f"-{point:04X}") and not name.startswith("HANGUL SYL"):
                rows.append(f"{point:04X} {name} {unicodedata.category(chr(point))}\n")
        if rows:
            yield f"U+{start:04X}", "".join(rows)


def _read(path: Path) -> str:
    """Source text; an undecodable byte becomes U+FFFD (old files declare other encodings)."""
    return path.read_text(encoding="utf-8", errors="replace")
