"""Files from elsewhere: none of them runs code."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cases import METHODS, OF_EIGHT
from moebalance.integrations.huggingface.state_file import STATE_FILE, read
from moebalance.lab import doctor
from moebalance.words.reprs import method_of

CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({mark!r}).touch()
class C(PretrainedConfig):
    model_type = "stranger"
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that brings its own code, and a stdin that says yes to everything."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    described = {"model_type": "stranger", "auto_map": {"AutoConfig": "code.C"}}
    (folder / "config.json").write_text(json.dumps(described))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return folder


def test_the_doctor_neither_asks_nor_runs_the_code_of_a_model_that_it_does_not_know(
    stranger: Path,
) -> None:
    with pytest.raises(ValueError, match="Transformers cannot read"):
        doctor.diagnose(stranger)
    assert not (stranger.parent / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9


HOSTILE_REPRS = [
    "__import__('os').system('touch ran')",
    "Together(*[])",
    "LossFree(**{})",
    "LossFree(speed=print('x'))",
    "LossFree().traits",
    "(lambda: 0)()",
    "[LossFree() for _ in range(9)]",
    "LossFree(speed='x')",
    "PhiBalancing(" * 5000,
    "Together(" * 90 + ")" * 90,
    "\0",
    "",
]


@pytest.mark.parametrize("text", HOSTILE_REPRS, ids=range(len(HOSTILE_REPRS)))
def test_a_method_in_a_state_file_is_read_and_never_evaluated(text: str) -> None:
    assert method_of(text) is None


@pytest.mark.parametrize("name", {**METHODS, **OF_EIGHT})
def test_the_repr_of_every_method_gives_the_method_back(name: str) -> None:
    method = {**METHODS, **OF_EIGHT}[name]
    assert method_of(repr(method)) == method


@pytest.mark.parametrize("described", ["[" * 9999, "[1]", "3", "x", "[[1, 2], 3]"])
def test_a_state_file_with_a_broken_description_is_refused_by_its_path(
    tmp_path: Path, described: str
) -> None:
    file = tmp_path / STATE_FILE
    save_file({"a/b": torch.zeros(1)}, file, metadata={"moebalance": described})
    with pytest.raises(ValueError, match="is damaged: its description") as refused:
        read(tmp_path)
    assert str(file) in str(refused.value)
