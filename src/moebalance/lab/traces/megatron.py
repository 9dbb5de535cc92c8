"""Megatron-Core's router traces: `--moe-routing-trace-path` writes one JSONL file for each rank.

A line is one call of one router: `step`, `block` and `layer` (and `mtp_idx`), `topk`, and
`top_indices`, the experts of each token. Calls of a layer in one step (micro-batches, ranks) are
added up. The number of experts stands in `logit_shape`, if logits were captured too, or in the
dumped routers; logits and dump together give the soft load (`sidecars.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moebalance.files import first_line, loads
from moebalance.lab.traces.load import (
    Load,
    Missing,
    as_run,
    counted,
    expert_count,
    guessed,
    indices,
)
from moebalance.lab.traces.sidecars import has_logits, read_scores, read_state
from moebalance.runlog import Run

PATTERN = "router_trace_rank*.jsonl"
_Key = tuple[str, int, int]


def read_megatron(files: Sequence[Path], missing: Missing) -> tuple[Run, str]:
    """The run of one trace, from the files of its ranks; and a note on what it does not say.

    Raises:
        ValueError: a line is not a record of a trace.
    """
    records = [record for file in files for record in _records(file)]
    states = [read_state(file) for file in files]
    said = {state.experts for state in states if state.experts}
    said |= {record["logit_shape"][-1] for record in records if record.get("logit_shape")}
    gate = next((state.gate for state in states if state.gate), None)
    chosen = [record["_experts"] for record in records]
    experts = expert_count(chosen, missing.experts or max(said, default=None))
    names = _names({record["_layer"] for record in records})
    steps: dict[int, dict[str, Load]] = {}
    for record in sorted(records, key=lambda r: r["_layer"]):
        scores = read_scores(record["_file"], record, gate) if gate else None
        load = Load(counted(record["_experts"], experts), len(record["_experts"]), scores)
        # Megatron counts steps from 0; step 0 of a run log is the time before training.
        step = steps.setdefault(record["step"] + 1, {})
        name = names[record["_layer"]]
        step[name] = step[name].plus(load) if name in step else load
    top_k = missing.top_k or max((part.shape[-1] for part in chosen), default=None)
    run = as_run(files[0], "a router trace of Megatron-Core", steps, top_k)
    if not gate and any(map(has_logits, files)):
        return run, _unread(files[0])
    return run, "" if missing.experts or said else guessed(files[0], experts)


def _unread(path: Path) -> str:
    return (
        f"The logits captured with {path.name} are not used: how they become scores stands in the "
        "dump of --moe-routing-trace-dump-weights, which is not next to it."
    )


def _records(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = loads(line)
                _check_numbers(record)
                mtp = record.get("mtp_idx", -1)
                record["_file"] = file
                record["_experts"] = _per_token(indices(record["top_indices"]))
                record["_layer"] = ("mtp" if mtp >= 0 else "decoder", mtp, record["layer"])
            except (ValueError, KeyError, TypeError) as error:
                cause = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
                raise ValueError(
                    f"{file}, line {number}: no record of a router trace ({cause}). Megatron "
                    "writes objects with step, layer and top_indices; remove that line to read "
                    "the rest."
                ) from None
            yield record


def _check_numbers(record: dict[str, Any]) -> None:
    """Refuse a step, a layer or a place of logits that is no whole number."""
    numbers = [record["step"], record["layer"], record.get("mtp_idx", -1) + 1]
    for number in (*numbers, *(record.get("logit_shape") or ()), record.get("logit_offset") or 0):
        if type(number) is not int or not 0 <= number < 2**62:
            raise ValueError(f"{number!r} is no whole number from 0 on")


def _per_token(chosen: Tensor) -> Tensor:
    return chosen.reshape(len(chosen), -1) if chosen.numel() else chosen


def _names(layers: set[_Key]) -> dict[_Key, str]:
    """Layers of the decoder by their number; those of multi-token prediction follow them."""
    last = max((layer for block, _, layer in layers if block == "decoder"), default=-1)
    extra = sorted(key for key in layers if key[0] == "mtp")
    found = {key: f"layer {key[2]}" for key in sorted(layers) if key[0] == "decoder"}
    for i, key in enumerate(extra, last + 1):
        found[key] = f"layer {i} (mtp {key[1]}.{key[2]})"
    return found
