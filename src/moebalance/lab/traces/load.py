"""Loads of steps, from any source, as a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.files import first_line
from moebalance.metrics.summary import summary
from moebalance.routing import Sums
from moebalance.runlog import FORMAT, Run

MOST_EXPERTS = 2**14
"""Experts of a layer that are read; a damaged index would ask for all memory."""
_SOFT = ("soft_maxvio", "soft_hard_gap")


@dataclass(frozen=True)
class Missing:
    """What a trace may not say; None where you do not know it either.

    Attributes:
        experts: number of experts of a layer.
        top_k: experts for each token.
        layers: number of MoE layers.
    """

    experts: int | None = None
    top_k: int | None = None
    layers: int | None = None


class Load(NamedTuple):
    """What one layer did with some tokens.

    Attributes:
        counts: (E,) assignments.
        tokens: how many.
        scores: (E,) summed scores; None if not known.
    """

    counts: Float[Tensor, "E"]
    tokens: float
    scores: Float[Tensor, "E"] | None = None

    def plus(self, other: Load) -> Load:
        """Both together."""
        known = self.scores is not None and other.scores is not None
        scores = self.scores + other.scores if known else None  # type: ignore[operator]
        return Load(self.counts + other.counts, self.tokens + other.tokens, scores)


Loads = Mapping[str, Load]
"""One load for each layer, by name."""


def indices(value: Any) -> Tensor:
    """The experts that a file holds, as integers.

    Raises:
        ValueError: they are no whole numbers; a cast would make experts of probabilities.
    """
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"its experts are no table of whole numbers ({first_line(error)})"
        ) from None
    # An empty list has no type of its own.
    if found.numel() and not _is_whole(found.dtype):
        kind = str(found.dtype).removeprefix("torch.")
        raise ValueError(
            f"its experts are {kind} numbers, and must be integers: the index of each expert that "
            "was chosen, −1 for none"
        )
    return found.long()


def real_tokens(mask: Any) -> Tensor:
    """Which tokens are no padding, from an `attention_mask`.

    Raises:
        ValueError: it is no table of numbers.
    """
    try:
        return torch.as_tensor(mask).bool()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"its attention_mask is no table of 0 and 1 ({first_line(error)})"
        ) from None


def expert_count(parts: Iterable[Tensor], said: int | None) -> int:
    """E: what was said, else the largest index plus one.

    Raises:
        ValueError: more than any layer has.
    """
    experts = said or 1 + max([0, *(int(part.max()) for part in parts if part.numel())])
    if not 1 <= experts <= MOST_EXPERTS:
        source = "as was said" if said else "by its largest index"
        raise ValueError(
            f"{source}, it has layers of {experts:,} experts, and 1 to {MOST_EXPERTS:,} are read: "
            "remove what is damaged, or give the right number with --experts"
        )
    return experts


def guessed(path: Path, experts: int) -> str:
    """A note on a number of experts that the trace does not say."""
    return (
        f"{path.name} does not say how many experts there are: {experts}, from the largest index. "
        "If the last ones were never chosen, give --experts."
    )


def counted(experts: Tensor, num_experts: int) -> Float[Tensor, "E"]:
    """How often each expert was chosen; a negative index stands for none.

    Raises:
        ValueError: an index is too large.
    """
    chosen = experts.reshape(-1)
    chosen = chosen[chosen >= 0]
    if len(chosen) and int(chosen.max()) >= num_experts:
        raise ValueError(
            f"expert {int(chosen.max())} was chosen, and there are {num_experts} (0 to "
            f"{num_experts - 1}): give the right number with --experts"
        )
    return torch.bincount(chosen, minlength=num_experts).float()


def added(loads: Sequence[Loads]) -> dict[str, Load]:
    """The loads of several steps together."""
    total: dict[str, Load] = {}
    for step in loads:
        for name, load in step.items():
            total[name] = total[name].plus(load) if name in total else load
    return total


def as_run(path: Path, source: str, steps: Mapping[int, Loads], top_k: int | None) -> Run:
    """A run with a row and a snapshot for each step, and the last third of them as evaluation.

    Args:
        path: of the trace.
        source: what wrote it, in words.
        steps: loads by step; from 1 on.
        top_k: experts of a token.

    Raises:
        ValueError: no step counted a token.
    """
    held = ((step, _routed(loads)) for step, loads in sorted(steps.items()))
    steps = {step: loads for step, loads in held if loads}
    if not steps:
        raise ValueError(f"{path} holds no routed token")
    order, last = list(steps), max(steps)
    names = list(dict.fromkeys(name for loads in steps.values() for name in loads))
    whole = [loads for loads in steps.values() if list(loads) == names]
    late = whole[-max(1, len(whole) // 3) :]
    alone = len(order) == 1
    rows = [(step, _row(steps[step])) for step in order]
    first = next(iter(steps[order[0]].values()))
    header = {
        "kind": "header",
        "format": FORMAT,
        "name": path.name,
        "method": "trace",
        # Traces of two files are two rows of a report, as two settings of a method are.
        "method_repr": f"Trace(file={str(path)!r})",
        "seed": None,
        "steps": last,
        "trace": source,
        "model": {
            "architecture": source,
            "num_experts": len(first.counts),
            "layers": names,
            **({"top_k": top_k} if top_k else {}),
        },
    }
    evaluation = _row(added(late)) if late else rows[-1][1]
    return Run(
        path,
        header,
        () if alone else tuple(_kind("step", step, _numbers(row)) for step, row in rows),
        () if alone else tuple(_kind("snapshot", step, _lists(row)) for step, row in rows),
        (_kind("eval", last, evaluation),),
        {"kind": "end", "status": "complete"},
    )


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _routed(loads: Loads) -> Loads:
    """Without layers that chose no expert, whose load is 0 of 0."""
    return {name: load for name, load in loads.items() if load.counts.any()}


def _row(loads: Loads) -> dict[str, Any]:
    """Metrics and loads of one step."""
    soft = all(load.scores is not None for load in loads.values())
    sums = [
        Sums(load.counts if load.scores is None else load.scores, load.counts, _scalar(load.tokens))
        for load in loads.values()
    ]
    numbers = {k: v for k, v in summary(sums).items() if soft or k not in _SOFT}
    dead = sum(int((s.hard_load * len(s.counts) < 0.01).sum()) for s in sums)
    lists = {"load": [_rounded(s.hard_load) for s in sums]}
    if soft:
        lists["soft"] = [_rounded(s.soft_load) for s in sums]
    return {**numbers, "dead_experts": dead, **lists}


def _rounded(load: Tensor) -> list[float]:
    return [round(x, 6) for x in load.tolist()]


def _scalar(value: float) -> Tensor:
    return torch.tensor(float(value))


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not isinstance(value, list)}


def _lists(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if isinstance(value, list)}


def _kind(kind: str, step: int, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "step": step, **row}
