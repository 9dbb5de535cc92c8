"""What importing costs, what is public, and that the examples in docstrings are true."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import pkgutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import moebalance
import moebalance.methods

DOCUMENTED = [
    "moebalance.routing",
    "moebalance.core.autograd",
    "moebalance.kernels.router",
    "moebalance.core.layer",
    "moebalance.core.handle",
    "moebalance.integrations.rule",
    "moebalance.methods",
    *(f"moebalance.methods.{m.name}" for m in pkgutil.iter_modules(moebalance.methods.__path__)),
]
HEAVY = ("torch", "transformers", "rich", "typer", "jinja2", "datasets", "accelerate", "numpy")


def python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    loaded = python(
        "import json, sys, moebalance\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert not set(HEAVY) & set(json.loads(loaded))


def test_the_library_itself_imports_no_framework():
    """Every public name but the Transformers integration, resolved."""
    loaded = python(
        "import json, sys, moebalance\n"
        "[getattr(moebalance, n) for n in moebalance.__all__ if n != 'huggingface']\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert not {"transformers", "rich", "typer", "jinja2", "datasets"} & set(json.loads(loaded))


def test_importing_costs_at_most_a_fifth_of_a_second_beyond_torch(tmp_path, monkeypatch):
    """Of CPU, which a busy machine does not stretch.

    With compiled bytecode at hand, as pip leaves it: the first import of a clone compiles.
    """
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    code = (
        "import time, torch\n"
        "start = time.process_time()\n"
        "import moebalance\n"
        "moebalance.PhiBalancing, moebalance.BalancedRouter, moebalance.attach\n"
        "print(time.process_time() - start)"
    )
    python(code)
    assert statistics.median(float(python(code)) for _ in range(3)) <= 0.2


def test_every_public_name_resolves():
    for name in moebalance.__all__:
        assert getattr(moebalance, name) is not None
    assert len(set(moebalance.__all__)) == len(moebalance.__all__)
    assert set(dir(moebalance)) >= set(moebalance.__all__)


def test_an_unknown_name_is_an_attribute_error_that_says_so():
    with pytest.raises(AttributeError, match="'phi_balancing'"):
        _ = moebalance.phi_balancing


def test_names_for_type_checkers_are_the_public_names():
    tree = ast.parse(Path(moebalance.__file__).read_text(encoding="utf-8"))
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    announced = {
        alias.asname: (statement.module, alias.name)
        for statement in block.body
        for alias in statement.names
    }
    assert set(announced) == set(moebalance.__all__) - {"__version__"} | set(moebalance._SUBMODULES)
    for name, (module, original) in announced.items():
        there = importlib.import_module(module)
        found = getattr(there, original, None) or importlib.import_module(f"{module}.{original}")
        assert getattr(moebalance, name) is found


def test_every_method_in_the_package_is_public():
    """The methods at the top, their goals and helpers in `moebalance.methods`."""
    there = {name: getattr(moebalance.methods, name) for name in moebalance.methods.__all__}
    kinds = {name for name, kind in there.items() if isinstance(kind, type)}
    methods = {name for name in kinds if issubclass(there[name], moebalance.Method)}
    assert len(methods) >= 16
    assert methods <= set(moebalance.__all__)
    public = {kind for kind in vars(moebalance.methods).values() if isinstance(kind, type)}
    assert {kind.__name__ for kind in public if issubclass(kind, moebalance.Method)} == methods


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
