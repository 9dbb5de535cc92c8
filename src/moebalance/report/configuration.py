"""What was run, in words and in rows: the line under the title, the settings, the list of runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moebalance.report.naming import by_setting, names
from moebalance.runlog import Run

_STATUS = {"no end row": "no end row (killed, or still running)"}


class Setting(NamedTuple):
    """A header entry: its dotted name and its one value, or the values it takes over the runs."""

    name: str
    values: tuple[str, ...]


def what_was_run(runs: Sequence[Run]) -> str:
    """Model, data, steps and seeds in one line; what the headers do not say is left out."""
    model = _shared(run.header.get("model") for run in runs)
    data = _shared(run.header.get("data") for run in runs)
    steps = _shared(run.header.get("steps") for run in runs)
    parts = []
    if isinstance(model, dict):
        parts.append(_model_words(model))
    elif any(run.header.get("model") for run in runs):
        parts.append("several models")
    if isinstance(data, dict):
        domains = data.get("domains")
        of = f" of {', '.join(map(str, domains))}" if isinstance(domains, list) and domains else ""
        tokens = _count(data.get("train_tokens"))
        parts.append(f"{tokens} training tokens{of}" if tokens else f"text{of}" if of else "")
    elif any(run.header.get("data") for run in runs):
        parts.append("several data sets")
    if isinstance(steps, int):
        parts.append(f"{steps:,} steps".replace(",", "\u202f"))
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    if seeds:
        parts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    parts.append(f"{len(runs)} run{'s' if len(runs) > 1 else ''}")
    return " · ".join(part for part in parts if part)


def settings(runs: Sequence[Run]) -> dict[str, list[Setting]]:
    """The headers' entries by group; an entry that varies lists its values, in order met."""
    groups = {}
    for title, key in (
        ("Recipe", "recipe"),
        ("Model", "model"),
        ("Data", "data"),
        ("Versions", "versions"),
    ):
        flat = [_flat(run.header.get(key)) for run in runs]
        names = list(dict.fromkeys(name for entries in flat for name in entries))
        found = [
            Setting(name, tuple(dict.fromkeys(entries.get(name, "—") for entries in flat)))
            for name in names
        ]
        if key == "versions":
            commits = dict.fromkeys(str(run.header.get("commit") or "unknown") for run in runs)
            found.append(Setting("commit", tuple(commits)))
        if found:
            groups[title] = found
    return groups


def folders(runs: Sequence[Run]) -> list[str]:
    """Where each run's log lies, under the folder that all have in common."""
    parents = [run.path.resolve().parent for run in runs]
    root = Path(os.path.commonpath(parents))
    found = (parent.relative_to(root).as_posix() for parent in parents)
    return [p.name if name == "." else name for p, name in zip(parents, found, strict=True)]


def differences(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Each run's entries of recipe, model, data and steps in which the runs differ."""
    flat = [
        _flat({key: run.header.get(key) for key in ("recipe", "model", "data", "steps")})
        for run in runs
    ]
    keys = dict.fromkeys(name for entries in flat for name in entries)
    varied = [name for name in keys if len({entries.get(name) for entries in flat}) > 1]
    return [{name: entries.get(name, "—") for name in varied} for entries in flat]


def run_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One row a run: what it was, how far it came, how it ended, where its log lies."""
    rows = []
    known = names(by_setting(runs))
    for run, folder in zip(runs, folders(runs), strict=True):
        planned = run.header.get("steps")
        status = _STATUS.get(run.status, run.status)
        error = run.end.get("error") if run.end else None
        wall_s = run.end.get("wall_s") if run.end else None
        rows.append(
            {
                "folder": folder,
                "method": str(known[run.method, run.method_repr]),
                "key": run.method,
                "method_repr": run.method_repr,
                "batching": str(run.header.get("batching") or "—"),
                "seed": "—" if run.seed is None else str(run.seed),
                "steps": f"{run.last_step}{'' if planned is None else f' / {planned}'}",
                "wall": f"{wall_s:.0f} s" if isinstance(wall_s, int | float) else "—",
                "status": status
                + (f": {error}" if error else "")
                + (" · last line cut off" if run.truncated else ""),
                "whole": "yes" if run.status == "complete" and not run.truncated else "no",
            }
        )
    return rows


def _model_words(model: Mapping[str, Any]) -> str:
    parts = [str(model.get("architecture") or "MoE model")]
    total, active = _count(model.get("parameters")), _count(model.get("active_parameters"))
    if total:
        parts.append(f"{total} parameters" + (f" ({active} active)" if active else ""))
    if model.get("num_experts"):
        top_k = f", top-{model['top_k']}" if model.get("top_k") else ""
        parts.append(f"{model['num_experts']} experts{top_k}")
    layers = model.get("layers")
    if isinstance(layers, list) and layers:
        parts.append(f"{len(layers)} MoE layer{'s' if len(layers) > 1 else ''}")
    if model.get("checkpoint"):
        trained = model.get("trained_parameters")
        part = "" if trained in (None, model.get("parameters")) else f" ({_count(trained)} of them)"
        parts.append(f"fine-tuned{part} from {model['checkpoint']}")
    return ", ".join(parts)


def _count(value: Any) -> str:
    """A count in at most three digits: 463 k, 1.24 M; empty for what is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        return ""
    for size, unit in ((1e9, "\u202fB"), (1e6, "\u202fM"), (1e3, "\u202fk")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _shared(values: Iterable[Any]) -> Any:
    """The one value that all have, or None."""
    known = list(values)
    return known[0] if all(value == known[0] for value in known) else None


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, item in value.items():
            found |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    if value is None and not prefix:
        return {}
    if isinstance(value, list):
        head = ", ".join(_words(item) for item in value[:8])
        return {prefix: head + (f", … ({len(value)})" if len(value) > 8 else "")}
    return {prefix: _words(value)}


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
