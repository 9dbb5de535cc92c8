"""Traces that cannot be: a short refusal with the file's name, whatever stands in it."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebalance.lab.traces import Missing, find_traces
from moebalance.lab.traces.load import MOST_EXPERTS

RECORD = {"step": 0, "block": "decoder", "layer": 0, "topk": 2, "top_indices": [[0, 1], [2, 3]]}
LINES = {
    "an infinite step": ({"step": float("inf")}, "line 1.*inf is no whole number"),
    "a step below 0": ({"step": -5}, "line 1.*-5 is no whole number"),
    "an infinite layer": ({"layer": float("inf")}, "line 1.*inf is no whole number"),
    "no layer": ({"layer": None}, "line 1.*None is no whole number"),
    "a layer of text": ({"mtp_idx": "x"}, "line 1"),
    "a table for a shape": ({"logit_shape": {"a": 1}}, "line 1.*'a' is no whole number"),
    "a shape of text": ({"logit_shape": "x"}, "line 1.*'x' is no whole number"),
    "a shape below 0": ({"logit_shape": [2, -8]}, "line 1.*-8 is no whole number"),
    "a huge shape": ({"logit_shape": [2, 10**12]}, "1,000,000,000,000 experts.*--experts"),
    "a huge index": ({"top_indices": [[10**8, 1]]}, "100,000,001 experts.*--experts"),
    "an index beyond integers": ({"top_indices": [[2**70, 1]]}, "line 1.*no table of whole"),
    "indices of text": ({"top_indices": [["a", 1]]}, "line 1.*no table of whole numbers"),
    "probabilities": ({"top_indices": [[0.5, 0.5]]}, "line 1.*must be integers"),
    "one number": ({"top_indices": 3}, "line 1"),
    "no expert at all": ({"top_indices": [[-1, -1]]}, "no routed token"),
    "no token": ({"top_indices": []}, "no routed token"),
}


def refused(path: Path, words: str, **missing: int) -> None:
    with pytest.raises(ValueError, match=words) as told:
        find_traces(path, Missing(**missing))
    assert str(path) in str(told.value)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize("case", LINES)
def test_a_router_trace_that_cannot_be_is_refused_by_its_path(tmp_path: Path, case: str) -> None:
    change, words = LINES[case]
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text(json.dumps({**RECORD, **change}) + "\n")
    refused(path, words)


def test_no_number_of_experts_asks_for_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    refused(path, "as was said", experts=MOST_EXPERTS + 1)
    (run,) = find_traces(path, Missing(experts=MOST_EXPERTS)).runs
    assert len(run.evals[-1]["load"][0]) == MOST_EXPERTS


def test_a_layer_that_chose_no_expert_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "router_trace_rank0.jsonl"
    idle = {**RECORD, "layer": 1, "top_indices": [[-1, -1]]}
    path.write_text(f"{json.dumps(RECORD)}\n{json.dumps(idle)}\n")
    (run,) = find_traces(path, Missing()).runs
    assert run.header["model"]["layers"] == ["layer 0"]


def test_a_damaged_dump_next_to_a_trace_is_refused_by_its_own_path(tmp_path: Path) -> None:
    path = tmp_path / "router_trace_rank0.jsonl"
    path.write_text(json.dumps(RECORD) + "\n")
    (tmp_path / "router_state_rank0.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"router_state_rank0\.pt is no dump of routers"):
        find_traces(path, Missing())


ARRAYS = {
    "probabilities": (np.full((4, 2, 2), 0.5), "float64 numbers, and must be integers"),
    "truths": (np.ones((4, 2, 2), dtype=bool), "bool numbers, and must be integers"),
    "text": (np.array([[["a"]]]), "no table of whole numbers"),
    "a huge index": (np.full((2, 1, 1), 2 * 10**10), "20,000,000,001 experts"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_holds_no_experts_is_refused_by_its_path(tmp_path: Path, case: str) -> None:
    held, words = ARRAYS[case]
    np.save(tmp_path / "rollouts.npy", held)
    refused(tmp_path / "rollouts.npy", words)


def test_every_kind_of_integer_is_read(tmp_path: Path) -> None:
    for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"):
        np.save(tmp_path / f"{kind}.npy", np.array([[[0, 1]], [[0, 2]]], dtype=kind))
        (run,) = find_traces(tmp_path / f"{kind}.npy", Missing()).runs
        assert run.evals[-1]["load"] == [[0.5, 0.25, 0.25]]


def header_of(shape: int) -> bytes:
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({shape},), }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


FILES = {
    "huge.npy": (header_of(10**12), "damaged"),
    "junk.npy": (b"hello", "does not begin as NumPy's files do"),
    "junk.npz": (b"hello", "does not begin as NumPy's files do"),
    "cut.npz": (b"PK\x03\x04junk", "damaged"),
    "infinite.jsonl": (b'{"routed_experts": [[[0, 1e999]]]}\n', "must be integers"),
    "long.jsonl": (b'{"routed_experts": [[[0, 1180591620717411303424]]]}\n', "no table of whole"),
    "short.jsonl": (b'{"routed_experts": "AAAA"}\n', "3 bytes.*--layers"),
    "odd.jsonl": (b'{"routed_experts": "!!!!"}\n', "base64"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_without_bad_advice(tmp_path: Path, name: str) -> None:
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as told:
        find_traces(tmp_path / name, Missing(layers=1, top_k=1))
    assert str(tmp_path / name) in str(told.value)
    assert "pickle" not in str(told.value)


def test_an_array_of_objects_is_refused_with_what_to_save(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(tmp_path / "o.npy", r"not loaded for safety. Save an array of integers.*np.save")


ODD_LOGITS: dict[str, tuple[dict[str, Any], str]] = {
    "a mask of text": ({"attention_mask": "x"}, "no table of 0 and 1"),
    "sparse": ({"router_logits": (torch.eye(4).to_sparse(),)}, "cannot be read as a trace"),
    "no values": ({"router_logits": (torch.empty(4, 8, device="meta"),)}, "cannot be read as"),
}


@pytest.mark.parametrize("case", ODD_LOGITS)
def test_logits_that_torch_cannot_work_with_are_refused_by_their_path(
    tmp_path: Path, case: str
) -> None:
    held = {"router_logits": (torch.randn(4, 8),), **ODD_LOGITS[case][0]}
    torch.save(held, tmp_path / "logits.pt")
    refused(tmp_path / "logits.pt", ODD_LOGITS[case][1], top_k=2)


def test_base64_of_whole_tokens_is_read(tmp_path: Path) -> None:
    text = base64.b64encode(np.array([0, 1, 0, 2], dtype="<i4").tobytes()).decode()
    (tmp_path / "r.jsonl").write_text(json.dumps({"routed_experts": text}) + "\n")
    (run,) = find_traces(tmp_path / "r.jsonl", Missing(layers=1, top_k=2)).runs
    assert run.evals[-1]["load"] == [[0.5, 0.25, 0.25]]
