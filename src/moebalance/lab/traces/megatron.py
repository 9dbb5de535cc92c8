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

import torch

from moebalance.files import loads
from moebalance.lab.traces.load import Load, Missing, as_run, counted
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
    largest = max((int(r["_experts"].max()) for r in records if r["_experts"].numel()), default=0)
    experts = missing.experts or (max(said) if said else largest + 1)
    names = _names({record["_layer"] for record in records})
    steps: dict[int, dict[str, Load]] = {}
    for record in sorted(records, key=lambda r: r["_layer"]):
        chosen = record["_experts"]
        scores = read_scores(record["_file"], record, gate) if gate else None
        load = Load(counted(chosen, experts), len(chosen), scores)
        # Megatron counts steps from 0; step 0 of a run log is the time before training.
        step = steps.setdefault(int(record["step"]) + 1, {})
        name = names[record["_layer"]]
        step[name] = step[name].plus(load) if name in step else load
    top_k = missing.top_k or max((r["_experts"].shape[-1] for r in records), default=None)
    run = as_run(files[0], "a router trace of Megatron-Core", steps, top_k)
    if not gate and any(map(has_logits, files)):
        return run, _unread(files[0])
    return run, "" if missing.experts or said else _guess(files[0], experts)


def _unread(path: Path) -> str:
    return (
        f"The logits captured with {path.name} are not used: how they become scores stands in the "
        "dump of --moe-routing-trace-dump-weights, which is not next to it."
    )


def _guess(path: Path, experts: int) -> str:
    return (
        f"{path.name} does not say how many experts there are: {experts}, from the largest index. "
        "If the last ones were never chosen, give --experts."
    )


def _records(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = loads(line)
                chosen = torch.tensor(record["top_indices"], dtype=torch.long)
                record["_file"] = file
                record["_experts"] = chosen.reshape(len(chosen), -1) if len(chosen) else chosen
                mtp = int(record.get("mtp_idx", -1))
                record["_layer"] = ("mtp" if mtp >= 0 else "decoder", mtp, int(record["layer"]))
                int(record["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}, line {number}: no record of a router trace ({error!r}). Megatron "
                    "writes objects with step, layer and top_indices; remove that line to read "
                    "the rest."
                ) from None
            yield record


def _names(layers: set[_Key]) -> dict[_Key, str]:
    """Layers of the decoder by their number; those of multi-token prediction follow them."""
    last = max((layer for block, _, layer in layers if block == "decoder"), default=-1)
    extra = sorted(key for key in layers if key[0] == "mtp")
    found = {key: f"layer {key[2]}" for key in sorted(layers) if key[0] == "decoder"}
    for i, key in enumerate(extra, last + 1):
        found[key] = f"layer {i} (mtp {key[1]}.{key[2]})"
    return found
