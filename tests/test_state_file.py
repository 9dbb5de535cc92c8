"""The balancing state as a file: round trips, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import moebalance as mb
from families import tiny, tokens
from moebalance.core.state import FORMAT


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    return mb.huggingface.save(balancing, tmp_path)


def test_a_state_file_round_trips(saved: Path) -> None:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    mb.huggingface.load(balancing, saved.parent)
    assert balancing.steps == 1
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    assert not list(saved.parent.glob("*.partial"))


def test_a_truncated_state_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        mb.huggingface.load(mb.attach(tiny("mixtral"), mb.PhiBalancing()), saved.parent)


def test_a_state_file_of_another_method_model_or_format_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="belongs to PhiBalancing, but the model is balanced by"):
        mb.huggingface.load(mb.attach(tiny("mixtral"), mb.LossFree()), saved.parent)
    with pytest.raises(ValueError, match="another model"):
        mb.huggingface.load(mb.attach(tiny("deepseek_v3"), mb.PhiBalancing()), saved.parent)
    with pytest.raises(ValueError, match="does not fit"):
        mb.huggingface.load(
            mb.attach(tiny("mixtral", num_local_experts=4), mb.PhiBalancing()), saved.parent
        )
    raw = saved.read_bytes()
    written = rf"\"format\": {FORMAT}".encode()
    for old, new in ((written, rb"\"format\": 9"), (rb"moebalance", rb"moebalancf")):
        assert old in raw
        saved.write_bytes(raw.replace(old, new))
        with pytest.raises(ValueError, match=r"format 9|not written by moebalance"):
            mb.huggingface.load(mb.attach(tiny("mixtral"), mb.PhiBalancing()), saved.parent)
