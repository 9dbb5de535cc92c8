"""Files from elsewhere: none of them runs code."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from moebalance.lab import doctor

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
