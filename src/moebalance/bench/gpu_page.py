"""The measurements of `benchmarks/gpu.py` as Markdown: the page "What it costs on a GPU"."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moebalance.bench.timing import NULL

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
        "Generated from benchmarks/results/gpu by `benchmarks/gpu.py --page`; do not edit by hand.",
        f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, "
        f"moebalance {machine['moebalance']} ({machine['commit']}).",
    ]
    if "alone" in results:
        parts.append(_alone(results["alone"]))
    if "on" in results:
        parts.append(_on(results["on"]))
    if "speed" in results:
        parts.append(_speed(results["speed"]))
    if "correct" in results:
        parts.append(_correct(results["correct"]))
    parts.append(_targets(results["targets"]))
    path = Path(path)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _alone(found: Mapping[str, Any]) -> str:
    lines = [
        "## One router",
        "",
        "Forward and backward. *Device* is a replay of a CUDA graph, the work without the host "
        "that starts it; *eager* is one call after the other from Python, where this host, not "
        f"the device, is the slower of the two. Measured as {found['how']}.",
    ]
    for row in found["rows"]:
        bare_us = row["variants"]["bare"]["device_us"]
        lines += [
            "",
            f"### {row['case']}",
            "",
            "| variant | device, µs | of the bare router | eager, µs |",
            "|---|---:|---:|---:|",
        ]
        lines += [
            f"| {name} | {v['device_us']} | {v['device_us'] / bare_us:.2f} | {v['eager_us']} |"
            for name, v in row["variants"].items()
        ]
    return "\n".join(lines)


def _on(rows: list[Any]) -> str:
    lines = [
        "## φ on or off in the fused router",
        "",
        "Replays of a CUDA graph, with φ over counting alone. Where weights are normalised, a "
        "router without a price need not read the logits again on the way back; with one it must.",
        "",
        "| case | null control | φ | 95 % interval |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        null, phi = row["variants"][NULL], row["variants"]["φ"]
        low, high = phi["interval"]
        lines.append(
            f"| {row['case']} | {null['ratio']:.3f} | {phi['ratio']:.3f} | {low:.3f}–{high:.3f} |"
        )
    return "\n".join(lines)


def _speed(rows: list[Any]) -> str:
    lines = [
        "## Bandwidth",
        "",
        "Logits read, and where there is one their gradient written, over the time of the pass; "
        "the choice, the weights and the sums move besides. Batches in turn, so that none is found "
        "in the cache.",
        "",
        f"| case | {' | '.join(_PASSES.values())} |",
        "|---|" + "---:|" * len(_PASSES),
    ]
    for row in rows:
        cells = (f"{row[p]['us']:.0f} µs, {row[p]['tb_per_s']:.1f} TB/s" for p in _PASSES)
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    lines = [
        "## What was to be reached",
        "",
        "| what | target | worst case | where |",
        "|---|---:|---:|---|",
    ]
    lines += [f"| {t['what']} | {t['target']} | {t['worst']} | {t['at']} |" for t in found]
    return "\n".join(lines)
