"""Hostile and huge logs and traces: an error names file, line and cause; memory stays small."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moebalance.files import MOST_DEEP, loads
from moebalance.lab.traces import Missing, find_traces
from moebalance.runlog import LOG_NAME, RunLog, find_runs, read_run
from moebalance.runlog.columns import Rows

HEADER = {"kind": "header", "format": 1, "method": "phi"}
DEEP = '{"kind": "step", "step": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
BAD = {
    "a step below 0": ('{"kind": "step", "step": -1}', 'integer "step" from 0 on, got -1'),
    "a huge step": ('{"kind": "step", "step": 99999999999999999999}', 'integer "step"'),
    "tokens below 0": ('{"kind": "eval", "step": 1, "tokens": -5}', '"tokens" is -5'),
    "100,000 deep": (DEEP, "nested 100001 deep"),
    "100,000 objects": (DEEP.replace("[", '{"a":[').replace("]", "]}"), "nested 200001 deep"),
    "half open": ('{"kind": "step", "x": ' + "[" * 100_000, "nested 100001 deep"),
}


@pytest.mark.survives(
    "Files and pages",
    "A log line with numbers below 0, or 100,000 lists within lists",
    "refused: with file, line and cause",
)
@pytest.mark.parametrize("case", BAD)
def test_a_hostile_line_of_a_log_is_refused_with_file_line_and_cause(
    tmp_path: Path, case: str
) -> None:
    line, cause = BAD[case]
    log = tmp_path / LOG_NAME
    log.write_text(f'{json.dumps(HEADER)}\n{line}\n{{"kind": "step", "step": 2}}\n')
    for read in (read_run, find_runs, lambda path: RunLog.resume(path, 1)):
        with pytest.raises(ValueError, match="line 2: ") as told:
            read(tmp_path)
        assert str(log) in str(told.value)
        assert cause in str(told.value)
        assert len(str(told.value)) < 500


@pytest.mark.parametrize("where", ["steps", "model", "data"])
def test_a_header_with_a_count_below_zero_is_refused(tmp_path: Path, where: str) -> None:
    inside = {"steps": {"steps": -4}, "model": {"model": {"top_k": -1}}}
    wrong = inside.get(where, {"data": {"val_tokens": -9}})
    (tmp_path / LOG_NAME).write_text(json.dumps({**HEADER, **wrong}) + "\n")
    with pytest.raises(ValueError, match="must be at least 0") as told:
        read_run(tmp_path)
    assert str(tmp_path / LOG_NAME) in str(told.value)


@pytest.mark.survives(
    "Files and pages",
    "A trace line with 100,000 lists within lists",
    "refused: with file, line and cause",
)
@pytest.mark.parametrize("name", ["trace.jsonl", "rollouts.jsonl"])
def test_a_hostile_line_of_a_trace_is_refused_with_file_line_and_cause(
    tmp_path: Path, name: str
) -> None:
    first = '{"top_indices": [[0]], "layer": 0, "step": 0}' if "trace" in name else "{}"
    (tmp_path / name).write_text(f"{first}\n{DEEP}\n")
    with pytest.raises(ValueError, match=r"nested 100001 deep|routed_experts") as told:
        find_traces(tmp_path / name, Missing())
    assert str(tmp_path / name) in str(told.value)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".pt", ".safetensors"])
def test_a_cut_file_of_arrays_is_refused_by_its_path(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"trace{ending}"
    if ending == ".npy":
        np.save(file, np.zeros((9, 2), dtype=int))
    elif ending == ".npz":
        np.savez(file, routed_experts=np.zeros((9, 2), dtype=int))
    elif ending == ".pt":
        torch.save({"routed_experts": torch.zeros(9, 2)}, file)
    else:
        save_file({"routed_experts": torch.zeros(9, 2)}, file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged: ") as told:
        find_traces(file, Missing(experts=4, top_k=2))
    assert str(file) in str(told.value)


def test_json_is_read_to_a_depth_and_no_deeper() -> None:
    assert loads("[" * MOST_DEEP + "]" * MOST_DEEP)
    with pytest.raises(ValueError, match="nested 101 deep"):
        loads("[" * (MOST_DEEP + 1) + "]" * (MOST_DEEP + 1))


def test_rows_in_columns_are_the_rows_that_came_in() -> None:
    came = [
        {"kind": "step", "step": 1, "loss": 2.5, "lr": None, "tokens": 3},
        {"kind": "step", "step": 2, "loss": None, "lr": 0.5, "tokens": 2**70, "more": "x"},
        {"step": 3, "loss": 1, "load": [[0.5, 0.5], [1.0]], "kind": "step", "flag": True},
        {"load": [[1, 2], [0.5]], "soft": [[]], "deep": [[[1.0]]], "kind": "step"},
        {},
    ]
    rows = Rows(came)
    assert rows == came
    assert [list(row) for row in rows] == [list(row) for row in came]  # in their order
    assert [type(value) for row in rows for value in row.values()] == [
        type(value) for row in came for value in row.values()
    ]
    assert list(rows.column("loss")) == [2.5, None, 1, None, None]
    assert list(rows[1:3]) == came[1:3]
    assert rows[-1] == {}
    with pytest.raises(IndexError):
        rows[5]


def test_a_long_log_takes_less_than_a_quarter_of_the_memory_of_its_objects(tmp_path: Path) -> None:
    steps = [{"kind": "step", "step": i, **dict.fromkeys("abcdefghij", i / 7)} for i in range(4000)]
    lines = [json.dumps(row) for row in (HEADER, *steps)]
    (tmp_path / LOG_NAME).write_text("\n".join(lines) + "\n")

    def held(read: Callable[[], object]) -> int:
        tracemalloc.start()
        kept = read()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size if kept is not None else 0

    as_objects = held(lambda: [json.loads(line) for line in lines])
    assert held(lambda: read_run(tmp_path)) < as_objects / 4
