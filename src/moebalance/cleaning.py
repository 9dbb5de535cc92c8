"""Names from elsewhere, made safe for the place that they are written to: one function a place.

A run log, a trace, a recipe or a model may come from anyone, and a name in it may hold anything.

    for_terminal    nothing moves the cursor, changes colours or hides text
    for_page        a whole HTML or SVG file: nothing that XML forbids
    for_markdown    every character stands for itself, on one line
    for_path        one name of a file or folder, never a way to another one

In HTML and SVG the template engine and Matplotlib escape what has a meaning there.
"""

import hashlib
import re

_C0 = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # ␛ for escape
_HIDDEN = (
    *range(0x80, 0xA0),  # more control characters: 0x9B begins what \x1b[ does
    0x061C,
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),  # the direction of text: what is seen is not what is there
    *range(0x2066, 0x206A),
    0x2028,
    0x2029,
    *range(0xD800, 0xE000),  # half a character, which no file can hold
    *range(0xFFF9, 0xFFFD),
    0xFEFF,
    0xFFFE,
    0xFFFF,
    *range(0xE0000, 0xE0080),
)
_SEEN = {**_C0, 0x7F: 0x2421, **dict.fromkeys(_HIDDEN, 0xFFFD)}
_MEANS = re.compile(r"[\\`*\[\]{}|$~^]|(?<!\w)_|_(?!\w)")
# What makes a line a list, a title, a rule, a comment or a block.
_BEGINS = re.compile(r"^(\d+(?=[.)](?:\s|$))|(?=[#=:%(!]|[-+](?:\s|$|[-+])))")
_MOST = 100  # bytes of a name; a file system allows 255


def for_terminal(text: str) -> str:
    """Text whose characters are seen and do nothing; lines stay lines.

    >>> for_terminal("loss" + chr(27) + "[2J")
    'loss␛[2J'
    """
    return text.translate(_SEEN)


def for_page(document: str) -> str:
    """A whole HTML or SVG file without characters that make it malformed."""
    return document.translate(_SEEN)


def for_markdown(text: str) -> str:
    """Text for a cell, a title or a paragraph of Markdown: no markup, no HTML, no second line.

    >>> for_markdown("[a](javascript:b) | <i> my_name")
    '\\\\[a\\\\](javascript:b) \\\\| &lt;i&gt; my_name'
    """
    line = re.sub(r"[ \n\t]+", " ", text.translate(_SEEN)).strip(" ")
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;")  # some readers make links
    line = _MEANS.sub(lambda found: f"\\{found[0]}", line)
    return _BEGINS.sub(r"\g<1>\\", line)


def for_path(name: str) -> str:
    """A name of one file or folder: what could lead elsewhere becomes `-`, and a digest is added.

    >>> for_path("one-domain"), for_path("phi(rate=0.5)+loss-free")
    ('one-domain', 'phi(rate=0.5)+loss-free')
    >>> for_path("../../x")
    'x-9cdf6a'
    """
    clean = re.sub(r"[^\w .,+()=@-]+", "-", name.translate(_SEEN)).strip(" .-")
    clean = clean.encode()[:_MOST].decode(errors="ignore")
    if clean == name != "":
        return clean
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:6]
    return f"{clean}-{digest}" if clean else f"unnamed-{digest}"
