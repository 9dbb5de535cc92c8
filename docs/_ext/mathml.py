"""Formulas as MathML, which every current browser sets by itself: no script, font or network."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

_SPACE = '<mspace width="0.17em" />'
_FUNCTION = re.compile(r"<mi>(?:log|cosh|tanh)</mi>")
_OPERAND = r"<m(?:i|n|sub|sup|subsup|frac)>"


def to_mathml(latex: str, display: str) -> str:
    """Set a formula; a function gets the space between it and its operands that TeX gives it."""
    found = convert(latex, display=display)
    found = re.sub(rf"({_FUNCTION.pattern})(?={_OPERAND})", rf"\1{_SPACE}", found)
    return re.sub(rf"(?<=</m[in]>|msub>)({_FUNCTION.pattern})", rf"{_SPACE}\1", found)


def _inline(writer: Any, node: nodes.math) -> NoReturn:
    writer.body.append(to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> NoReturn:
    writer.body.append(f'<div class="math-block">{to_mathml(node.astext().strip(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer and make it the site's."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
