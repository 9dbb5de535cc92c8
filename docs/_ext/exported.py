"""`.. methods:: loss` documents every method that acts on the loss: the API page misses none."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from moebalance.methods import Method
from moebalance.words.methods import method_classes


def lever(kind: type[Method]) -> str:
    """Where a method acts: on the "loss", on the "choice" of experts, or on "nothing"."""
    traits = kind().traits
    if traits.charges:
        return "loss"
    return "choice" if traits.selects else "nothing"


class Methods(SphinxDirective):
    """The exported methods with one lever, each with its docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Let autodoc write them."""
        names = sorted(
            k.__name__ for k in method_classes().values() if lever(k) == self.arguments[0]
        )
        text = "\n".join(f".. autoclass:: moebalance.methods.{name}" for name in names)
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directive."""
    app.add_directive("methods", Methods)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
