"""Expert loads for serving engines, which lay experts out on GPUs by them.

    balancing = mb.attach(model, method)       # or a Monitor, or the folder of a run log
    serving.save_sglang(balancing, "loads.json", num_layers=model.config.num_hidden_layers)

    python -m sglang.launch_server … --init-expert-location loads.json

SGLang takes {"logical_count": L × E}, a row for every layer of the model, and vLLM's EPLB takes a
tensor (L, E) with a row for every MoE layer. Both place the experts themselves. A run log is read
without torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebalance.files import write_text
from moebalance.runlog import Run, read_run

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from moebalance.core.handle import Balancing, Loads
    from moebalance.monitoring import Monitor

    Source = Balancing | Monitor | Mapping[str, Loads] | Run | Path | str

PARTS = 1_000_000
"""What the counts of a layer add up to where a source has loads (fractions) and no counts."""

Counts = dict[str, list[int]]


def expert_counts(source: Source) -> Counts:
    """How many assignments each expert got, a list of E by the name of each MoE layer.

    Args:
        source: a handle or a monitor: the assignments of the last step; what `loads()` or
            `evaluation()[1]` returned, or a run log (its last snapshot): parts in a million.

    Raises:
        ValueError: the source has no loads yet.
    """
    if isinstance(source, Run | Path | str):
        found = _of_run(source if isinstance(source, Run) else read_run(source))
    elif isinstance(source, Mapping):
        found = {name: _parts(hard.tolist()) for name, (hard, _) in source.items()}
    else:
        found = _of_handle(source)
    if not found:
        raise ValueError(
            f"{type(source).__name__} has no loads yet: export after step() was called, or, for a "
            "run log, after a snapshot was written (snapshot_every=…)."
        )
    return found


def save_sglang(source: Source, path: Path | str, *, num_layers: int | None = None) -> Path:
    """Write loads as SGLang's `--init-expert-location` reads them.

    Args:
        source: see `expert_counts`.
        path: of the file. SGLang knows it by its ending, ".json".
        num_layers: layers of the model, dense ones included (`config.num_hidden_layers`): rows are
            then placed by the number in a layer's name, and a dense layer's row is 0.

    Returns:
        The path.

    Raises:
        ValueError: another ending; no `num_layers` although some layer is dense; a layer's number
            that is too large.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"{path}: SGLang reads loads from a name that ends in .json.")
    rows = _rows(expert_counts(source), num_layers)
    write_text(path, json.dumps({"logical_count": rows}))
    return path


def vllm_expert_load(source: Source) -> Int[Tensor, "L E"]:
    """Loads as vLLM's EPLB takes them (`global_expert_load`): (MoE layers, experts), int64."""
    import torch

    return torch.tensor(list(expert_counts(source).values()), dtype=torch.int64)


def _of_handle(source: Balancing | Monitor) -> Counts:
    balancing = source.balancing if hasattr(source, "balancing") else source
    sums = {name: layer.last_sums for name, layer in balancing.layers.items()}
    return {
        name: [round(count) for count in seen.counts.tolist()]
        for name, seen in sums.items()
        if seen is not None
    }


def _of_run(run: Run) -> Counts:
    if not run.snapshots:
        return {}
    loads: list[list[float]] = run.snapshots[-1]["load"]
    model: Mapping[str, Any] = run.header.get("model") or {}
    names = model.get("layers")
    if not isinstance(names, list):  # a number of layers, or nothing
        names = [str(number) for number in range(len(loads))]
    return {name: _parts(load) for name, load in zip(names, loads, strict=True)}


def _parts(load: list[float]) -> list[int]:
    return [round(part * PARTS) for part in load]


def _rows(counts: Counts, num_layers: int | None) -> list[list[int]]:
    """The counts by layer of the model, dense ones included."""
    numbers = [_number(name, place) for place, name in enumerate(counts)]
    if num_layers is None:
        if numbers != list(range(len(numbers))):
            raise ValueError(
                f"These MoE layers have the numbers {numbers}, and SGLang wants a row for every "
                "layer: give num_layers=config.num_hidden_layers."
            )
        num_layers = len(numbers)
    if max(numbers) >= num_layers:
        raise ValueError(f"num_layers={num_layers}, but a balanced layer is number {max(numbers)}.")
    rows = [[0] * len(next(iter(counts.values()))) for _ in range(num_layers)]
    for number, row in zip(numbers, counts.values(), strict=True):
        rows[number] = row
    return rows


def _number(name: str, place: int) -> int:
    """The first number in a layer's name, as in model.layers.3.mlp.gate; else its place."""
    found = re.search(r"\d+", name)
    return int(found.group()) if found else place
