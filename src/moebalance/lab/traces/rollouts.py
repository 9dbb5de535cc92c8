"""`routed_experts` of rollouts: the experts of each token in each layer, as inference engines say.

Accepted are arrays (T, L, K), or (B, S, L, K) with an `attention_mask` (B, S) if there is padding;
lists of them; and the flat int32 in base64 that servers send, whose L and K must be given. −1
stands for no expert.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebalance.files import loads
from moebalance.lab.traces.load import (
    Load,
    Missing,
    added,
    as_run,
    counted,
    expert_count,
    guessed,
    indices,
    real_tokens,
)
from moebalance.runlog import Run

KEY = "routed_experts"


def read_rollouts(
    path: Path, rows: Iterator[Mapping[str, Any]], missing: Missing
) -> tuple[Run, str]:
    """One run whose evaluation is all tokens of all rollouts; and a note on what they do not say.

    Raises:
        ValueError: a shape is wrong, or L and K are needed and not given.
    """
    parts = [_tokens(found, row, path, missing) for row in rows for found in _found(row)]
    if not parts:
        raise ValueError(f"{path} has no {KEY}")
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"{path} has rollouts of several shapes (layers, top_k): {sorted(shapes)}")
    experts = expert_count(parts, missing.experts)
    loads = added([_loads(part, experts) for part in parts])
    run = as_run(path, "the experts of rollouts", {1: loads}, parts[0].shape[-1])
    return run, "" if missing.experts else guessed(path, experts)


def lines_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSONL file.

    Raises:
        ValueError: a line is no object.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: not a JSON object")
                yield row


def holds_rollouts(row: Any) -> bool:
    """Whether this has `routed_experts`, or its `meta_info` does."""
    return isinstance(row, Mapping) and bool(_found(row))


def _found(row: Mapping[str, Any]) -> list[Any]:
    places = (row, row.get("meta_info"))
    values = [place[KEY] for place in places if isinstance(place, Mapping) and KEY in place]
    known = [value for value in values if value is not None]
    # One tensor a sequence, as rollouts of different lengths are saved.
    each = [v if isinstance(v, list) and v and isinstance(v[0], Tensor) else [v] for v in known]
    return [value for some in each for value in some]


def _tokens(value: Any, row: Mapping[str, Any], path: Path, missing: Missing) -> Tensor:
    """The experts of real tokens, (T, L, K)."""
    if isinstance(value, str):
        if missing.layers is None or missing.top_k is None:
            raise ValueError(
                f"{path} has {KEY} as flat base64, which says neither layers nor experts a token: "
                "give --layers and --top-k"
            )
        held = base64.b64decode(value, validate=True)
        if len(held) % (4 * missing.layers * missing.top_k):
            raise ValueError(
                f"{path} has {KEY} of {len(held)} bytes, which are no whole tokens of "
                f"{missing.layers} layers × {missing.top_k} experts of 4 bytes: check --layers and "
                "--top-k"
            )
        flat = np.frombuffer(held, dtype="<i4").astype(np.int64)
        return torch.from_numpy(flat).reshape(-1, missing.layers, missing.top_k)
    experts = indices(value)
    if experts.dim() not in (3, 4):
        raise ValueError(
            f"{path} has {KEY} of shape {tuple(experts.shape)}; it must be (tokens, layers, top_k) "
            "or (batch, sequence, layers, top_k)"
        )
    mask = row.get("attention_mask")
    if mask is not None:
        real = real_tokens(mask)
        if real.shape != experts.shape[:-2]:
            raise ValueError(
                f"{path} has an attention_mask of shape {tuple(real.shape)} for {KEY} of shape "
                f"{tuple(experts.shape)}; it must have the shape without layers and top_k"
            )
        return experts[real]
    return experts.flatten(0, -3)


def _loads(experts: Tensor, num_experts: int) -> dict[str, Load]:
    found = {}
    for i, layer in enumerate(experts.unbind(dim=1)):
        real = (layer >= 0).any(dim=-1)
        if real.any():  # a dense layer has −1 throughout
            found[f"layer {i}"] = Load(counted(layer, num_experts), int(real.sum()))
    return found
