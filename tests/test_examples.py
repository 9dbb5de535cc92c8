"""The examples run, and show what they claim."""

import importlib.util
from pathlib import Path
from types import ModuleType

import moebalance as mb

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_pytorch_example_balances_and_is_short() -> None:
    plain = example("plain_pytorch")
    without = plain.train(mb.NoBalancing())
    with_phi = plain.train(mb.PhiBalancing(strength=0.01))
    # Both are of one step's tokens, with the noise of so few: 0.62 and 0.64 of the one without.
    assert with_phi["maxvio"] < 0.75 * without["maxvio"]
    assert with_phi["gini"] < 0.75 * without["gini"]
    assert len((EXAMPLES / "plain_pytorch.py").read_text().splitlines()) < 60
