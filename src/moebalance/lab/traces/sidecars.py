"""What Megatron-Core writes next to a router trace, if it was asked to.

| file | written with `--moe-routing-trace-…` | used for |
|---|---|---|
| `logits_rank{N}.bin` | `capture-logits` | the soft load |
| `router_state_rank{N}.pt` | `dump-weights` | the number of experts, the score function |
| `hidden_states_rank{N}.bin` | `capture-hidden-states` | nothing |

Logits are bfloat16; the trace's line of a call says where: `logit_offset`, `logit_bytes` and
`logit_shape`. A state holds `weight` (E, H), `score_function` and more for each layer.

Shapes: T tokens, E experts, H width of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import Gate, Sigmoid, Softmax, SqrtSoftplus

_NAME = re.compile(r"(logits|hidden_states|router_state)_rank(\d+)\.(bin|pt)")
_GATES: dict[str, Gate] = {
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
    "sqrtsoftplus": SqrtSoftplus(),
}


class State(NamedTuple):
    """What the dumped routers say of all of them.

    Attributes:
        experts: E; None if there is no dump.
        gate: how logits become scores; None if the dump does not say.
    """

    experts: int | None = None
    gate: Gate | None = None


def trace_of(path: Path) -> Path | None:
    """The trace that such a file belongs to; None for any other file."""
    found = _NAME.fullmatch(path.name)
    return path.with_name(f"router_trace_rank{found[2]}.jsonl") if found else None


def read_state(trace: Path) -> State:
    """What the dump next to a rank's trace says.

    Raises:
        ValueError: the dump is of another form.
    """
    path = _beside(trace, "router_state", "pt")
    if path is None:
        return State()
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        layers = [layer for layer in held.values() if isinstance(layer, Mapping)]
        experts = {len(layer["weight"]) for layer in layers}
    except OSError:
        raise
    except Exception as error:  # whatever torch says of a damaged file
        raise ValueError(
            f"{path} is no dump of routers as Megatron-Core writes it ({error!r}): move it away to "
            "read the trace without it."
        ) from None
    words = {str(layer.get("score_function")) for layer in layers}
    gate = _GATES.get(words.pop()) if len(words) == 1 else None
    return State(max(experts, default=None), gate)


def has_logits(trace: Path) -> bool:
    """Whether logits lie next to a rank's trace."""
    return _beside(trace, "logits", "bin") is not None


def read_scores(trace: Path, record: Mapping[str, Any], gate: Gate) -> Float[Tensor, "E"] | None:
    """The scores of one call, summed over its tokens; None without logits.

    Args:
        trace: of the rank.
        record: a line of it.
        gate: how logits become scores.

    Raises:
        ValueError: the file of logits ends too early, or a shape does not fit.
    """
    path = _beside(trace, "logits", "bin")
    if path is None or record.get("logit_offset") is None:
        return None
    shape = record["logit_shape"]
    with path.open("rb") as file:
        file.seek(record["logit_offset"])
        held = bytearray(file.read(2 * shape[0] * shape[-1]))
    if len(shape) != 2 or len(held) != 2 * shape[0] * shape[1]:
        raise ValueError(
            f"{path} does not hold the logits {tuple(shape)} of step {record['step']}, layer "
            f"{record['layer']}: was it cut off? Move it away to read the trace without it."
        )
    if not held:
        return None
    return gate.scores(torch.frombuffer(held, dtype=torch.bfloat16).reshape(shape)).sum(dim=0)


def _beside(trace: Path, kind: str, suffix: str) -> Path | None:
    rank = re.search(r"rank(\d+)", trace.name)
    path = trace.with_name(f"{kind}_rank{rank[1]}.{suffix}") if rank else None
    return path if path and path.is_file() else None
