"""Annotated shapes are ones that a checker can read: `make shapes` runs the laws under one."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from documents import ROOT

CHECKED = """
import torch
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook("moebalance", "beartype.beartype"):
    from moebalance.methods.ema import Ema
    from moebalance.routing import count
average = Ema.empty(4)
average.peek(torch.zeros(4), 0.1)
for wrong in (lambda: average.peek(torch.zeros(2, 4), 0.1),
              lambda: count(torch.zeros(3, 4), torch.zeros(3, 1), torch.zeros(3, 2).long(), None)):
    try:
        wrong()
    except TypeCheckError:
        continue
    raise SystemExit("a wrong shape passed")
"""


def shapes(tree: ast.AST) -> list[ast.expr]:
    """The second argument of every `Float[Tensor, …]`, and of the other kinds."""
    return [
        node.slice.elts[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id in {"Float", "Int", "Bool"}
        and isinstance(node.slice, ast.Tuple)
    ]


@pytest.mark.parametrize(
    "file",
    sorted((ROOT / "src/moebalance").rglob("*.py")),
    ids=lambda file: file.relative_to(ROOT).as_posix(),
)
def test_a_shape_is_a_string(file):
    """A bare name is never evaluated, so that nothing would be checked."""
    found = shapes(ast.parse(file.read_text(encoding="utf-8")))
    assert [ast.unparse(s) for s in found if not isinstance(s, ast.Constant | ast.JoinedStr)] == []
    assert all(isinstance(s.value, str) for s in found if isinstance(s, ast.Constant))


def test_a_wrong_shape_is_refused_where_types_are_checked():
    done = subprocess.run([sys.executable, "-c", CHECKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
