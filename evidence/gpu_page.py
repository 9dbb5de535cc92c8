"""The measurements of `benchmarks/gpu.py` as Markdown: the page "What it costs on a GPU"."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moebalance.files import write_text
from moebalance.lab.bench.timing import NULL

_PASSES = {
    "choose": "choose and count, forward",
    "pull_back": "its gradient and the price's, backward",
    "count": "count for another's router",
    "pull": "the price's gradient for it",
}


def write_gpu_page(results: Mapping[str, Any], path: Path | str) -> Path:
    """Write what there is of a GPU's results.

    Args:
        results: what `benchmarks/gpu.py` wrote as JSON, any of its parts.
        path: the Markdown file.
    """
    machine = results["machine"]
    parts = [
        "# What it costs on a GPU",
        "Generated from benchmarks/results/h200.json by `python -m evidence`; do not edit by hand.",
        f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"moebalance {machine['moebalance']} ({machine['commit']}).",
    ]
    parts += results.get("notes", [])
    sections: dict[str, Callable[[Any], str]] = {
        "router": _router,
        "on": _on,
        "speed": _speed,
        "step": _step,
        "correct": _correct,
        "targets": _targets,
    }
    # A part that failed is no list of rows; the script says on its screen why.
    parts += [
        section(results[name])
        for name, section in sections.items()
        if results.get(name) and "failed" not in results[name]
    ]
    return write_text(path, "\n\n".join(parts) + "\n")


def _router(rows: list[Any]) -> str:
    text = (
        "## One router\n\nForward and backward, compared with a bare router. *Device* is a "
        "replay of a CUDA graph: the work without the host that starts it. *Eager* is one call "
        "after the other from Python. It takes as long as the slower of device and host."
    )
    return "\n\n".join([text, *(f"### {row['case']}\n\n{_variants(row)}" for row in rows)])


def _variants(row: Any) -> str:
    rows = []
    for name, eager in row["variants"].items():
        device = eager["device"]
        cells = ["–", "–"]  # what waits for the device cannot be captured
        if device is not None:
            cells = [f"{1e3 * device['time_ms']:.0f}", f"{device['ratio']:.2f}"]
        rows.append([name, *cells, f"{1e3 * eager['time_ms']:.0f}", f"{eager['ratio']:.2f}"])
    return _table(["variant", "device, µs", "to bare", "eager, µs", "to bare"], rows)


def _on(rows: list[Any]) -> str:
    text = (
        "## φ on or off in the fused router\n\nReplays of a CUDA graph, φ over counting alone. "
        "With normalised weights and no price, the backward pass need not read the logits again. "
        "With a price it must."
    )
    return f"{text}\n\n{_ratios(rows)}"


def _step(rows: list[Any]) -> str:
    text = "## A whole training step\n\nForward, backward and `Balancing.step()`."
    return f"{text}\n\n{_ratios(rows)}"


def _ratios(rows: list[Any]) -> str:
    """φ over the bare variant of each case, and the null control."""
    lines = []
    for row in rows:
        null, phi = row["variants"][NULL], row["variants"]["φ"]
        low, high = phi["interval"]
        lines.append(
            [row["case"], f"{null['ratio']:.3f}", f"{phi['ratio']:.3f}", f"{low:.3f}–{high:.3f}"]
        )
    return _table(["case", "null control", "φ", "95 % interval"], lines)


def _speed(rows: list[Any]) -> str:
    text = (
        "## Bandwidth\n\nBytes of logits read, and of their gradient written, over the time of the "
        "pass. The choice, the weights and the sums move too and are not counted. Batches take "
        "turns, so that none is found in the cache."
    )
    lines = [
        [row["case"], *(f"{row[p]['us']:.0f} µs, {row[p]['tb_per_s']:.1f} TB/s" for p in _PASSES)]
        for row in rows
    ]
    return f"{text}\n\n{_table(['case', *_PASSES.values()], lines)}"


def _correct(found: Mapping[str, Any]) -> str:
    worst = {
        kind: max(
            value
            for row in found["rows"]
            if kind in row["case"]
            for name, value in row.items()
            if name not in ("case", "other_choice")
        )
        for kind in ("float32", "bfloat16")
    }
    return (
        f"## Correctness\n\nOf {len(found['rows'])} cases, 8 to 2304 experts, against the plain "
        f"form in float64 (at {found['commit']}): the largest error of weights, sums and gradients "
        f"is {worst['float32']:.0e} of the largest value in float32, {worst['bfloat16']:.0e} in "
        "bfloat16."
    )


def _targets(found: list[Any]) -> str:
    lines = [[t["what"], t["target"], str(t["worst"]), t["at"]] for t in found]
    head = ["what", "target", "worst case", "where"]
    return f"## What was to be reached\n\n{_table(head, lines)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Words to the left, numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))
