"""What it costs to see: whole training steps with a monitor, next to none.

A small Qwen3-MoE trains on random tokens. Its twins share the parameters; each is watched in
another way, and every round times all of them in a new random order. The bare one runs twice, as a
null control. Processor time is measured, which other programs disturb less.

    PYTHONPATH=src python benchmarks/monitoring.py    # benchmarks/results/, docs/cost_monitoring.md
    PYTHONPATH=src python benchmarks/monitoring.py counting_ms    # that part again, the rest kept
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import moebalance as mb
from moebalance.lab.bench import describe_machine
from moebalance.lab.bench.step import StepCase, build, twin
from moebalance.lab.bench.timing import BARE, NULL, interleaved, keep_freed_memory
from moebalance.lab.trackers import track

CASES = {StepCase(): 32, StepCase(hidden=512, layers=2, tokens=2048): 12}
"""Rounds of each."""
EVERY = 25
"""Steps between snapshots, as in a recipe."""
WATCHED, METRICS, RATIO = "monitor with a run log", "metrics of every step", "and gradient ratio"
ROOT = Path(__file__).parents[1]
Step = Callable[[], object]


def measure(case: StepCase, rounds: int) -> dict[str, Any]:
    """Time every variant once a round: watching an unbalanced model, then a balanced one."""
    model = build(case)
    ids = torch.randint(0, 256, (case.tokens // case.length, case.length))
    with ExitStack() as stack:
        log = Path(stack.enter_context(TemporaryDirectory())) / "run"
        monitor = stack.enter_context(mb.monitor(twin(model), log, snapshot_every=EVERY))
        calls = {name: _bare(twin(model), ids) for name in (BARE, NULL)}
        calls[WATCHED] = _watched(monitor, ids)
        alone = interleaved(calls, rounds=rounds, clock=processor_s)
        calls = {name: _balanced(twin(model), ids) for name in (BARE, NULL)}
        calls[METRICS] = _balanced(twin(model), ids, metrics=True)
        calls[RATIO] = _balanced(twin(model), ids, metrics=True, weighed=True)
        balanced = interleaved(calls, rounds=rounds, clock=processor_s)
        end_ms = 1e3 * sum(_ends(monitor, ids)) / EVERY
    sizes = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    return {
        "case": str(case),
        **sizes,
        "rounds": rounds,
        "every": EVERY,
        "end_of_step_ms": round(end_ms, 4),
        "none": {name: asdict(found) for name, found in alone.items()},
        "phi": {name: asdict(found) for name, found in balanced.items()},
    }


def counting_ms(case: StepCase, rounds: int = 300) -> dict[str, float]:
    """What counting adds to the routers of a step, forward and backward, measured without the rest.

    It is too little for the noise of whole steps.
    """
    model = build(case)
    logits = torch.randn(case.tokens, case.hidden)
    with mb.monitor(twin(model)) as monitor:
        calls = {
            name: _routed(watched.model.layers[0].mlp.gate, logits)  # type: ignore[union-attr]
            for name, watched in ((BARE, model), (NULL, twin(model)), (WATCHED, monitor.model))
        }
        timed = interleaved(calls, rounds=rounds, clock=processor_s)
        assert monitor.step()["tokens"] > 0
    bare = timed[BARE].time_ms
    return {
        "noise": round(case.layers * bare * abs(timed[NULL].ratio - 1), 3),
        "added": round(case.layers * bare * (timed[WATCHED].ratio - 1), 3),
    }


def tracker_ms(layers: int, experts: int, steps: int = 500) -> float:
    """Time a step to send a run to TensorBoard with all that is shown, in its own thread."""
    dice = torch.Generator().manual_seed(0)
    with TemporaryDirectory() as folder:
        with mb.runlog.RunLog(Path(folder)) as log:
            log.write("header", method="phi", steps=steps)
            for step in range(1, steps + 1):
                log.write("step", step=step, **dict.fromkeys("abcdefghijkl", 0.5))
                if step % EVERY == 0:
                    load = torch.rand(layers, experts, generator=dice).tolist()
                    log.write("snapshot", step=step, load=load)
        return 1e3 * processor_s(lambda: track(folder, ["tensorboard"]), 1) / steps


def processor_s(call: Step, repeats: int) -> float:
    """The processor's time of a call."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def _bare(model: nn.Module, ids: Tensor) -> Step:
    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    return step


def _routed(router: nn.Module, tokens: Tensor) -> Step:
    def step() -> None:
        # The task's gradient reaches a router through the weights of the chosen.
        router(tokens.requires_grad_())[1].square().sum().backward()

    return step


def _watched(monitor: mb.Monitor, ids: Tensor) -> Step:
    train = _bare(monitor.model, ids)

    def step() -> None:
        train()
        monitor.step()

    return step


def _ends(monitor: mb.Monitor, ids: Tensor) -> Iterator[float]:
    """The end of a step alone: its metrics, a row of the log, and one snapshot among them."""
    small = ids[:1, :16]
    for _ in range(EVERY):
        _bare(monitor.model, small)()
        yield processor_s(monitor.step, 1)


def _balanced(
    model: nn.Module, ids: Tensor, *, metrics: bool = False, weighed: bool = False
) -> Step:
    balancing = mb.attach(model, mb.PhiBalancing(strength=0.01))
    balancing.weigh_gradient(weighed)
    train = _bare(model, ids)

    def step() -> None:
        train()
        balancing.step()
        if metrics:
            balancing.metrics()

    return step


def page(found: dict[str, Any]) -> str:
    """The results as a page of the documentation."""
    machine = found["machine"]
    lines = [
        "# What monitoring costs",
        "",
        "Generated by `python benchmarks/monitoring.py`; do not edit by hand. How much of a step "
        "does it take to see the experts? Time is the median ratio to the same step without, in "
        "the same round, with its 95 % interval. What the null control shows beyond 1 is noise. "
        "Time is the processor's.",
        "",
        f"{machine['device']}, {machine['threads']} thread, torch {machine['torch']}, moebalance "
        f"{machine['moebalance']} ({machine['commit']}), transformers "
        f"{machine['others']['transformers']}.",
    ]
    for case in found["cases"]:
        for base, head in (("none", "no balancing"), ("phi", "φ-balancing")):
            lines += ["", f"## {case['case']}, {head}, {case['rounds']} rounds", ""]
            lines += ["| variant | time | 95 % interval | ms |", "|---|---:|---:|---:|"]
            for name, row in case[base].items():
                low, high = row["interval"]
                lines.append(
                    f"| {name} | {row['ratio']:.4f} | {low:.4f}–{high:.4f} | {row['time_ms']:.1f} |"
                )
    lines += [
        "",
        "## The parts that can be measured alone",
        "",
        "| part | ms a step | of the step |",
        "|---|---:|---:|",
    ]
    for case in found["cases"]:
        part = case["end_of_step_ms"] / case["none"][BARE]["time_ms"]
        lines.append(
            f"| end of a monitored step: sums, metrics, a row of the log, every {case['every']} "
            f"steps a snapshot; {case['case']} | {case['end_of_step_ms']:.2f} "
            f"| {100 * part:.2f} % |"
        )
    for case in found["cases"]:
        counting, step_ms = found["counting_ms"][case["case"]], case["none"][BARE]["time_ms"]
        added, noise = counting["added"], counting["noise"]
        part, unsure = 100 * added / step_ms, 100 * noise / step_ms
        lines.append(
            f"| counting: what a hook adds to the routers, forward and backward; {case['case']} "
            f"| {added:.2f} (null {noise:.2f}) | {part:.2f} % (null {unsure:.2f} %) |"
        )
        both = added + case["end_of_step_ms"]
        lines.append(
            f"| **monitoring**, these two; {case['case']} | {both:.2f} "
            f"| **{100 * both / step_ms:.2f} %** |"
        )
    for name, value in found["tracker_ms"].items():
        lines.append(
            f"| TensorBoard with pictures, tables and percentiles, {name}; in a thread of its own "
            f"| {value:.2f} | |"
        )
    lines += [
        "",
        "Counting is a softmax over the logits and a sum in the backward pass of each router. It "
        "grows with tokens × experts, and a step grows with the width of the model too, so a wider "
        "model pays a smaller part. Nothing of it waits for a tracker.",
    ]
    return "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[], Any]] = {
    "machine": lambda: describe_machine("cpu"),
    "cases": lambda: [measure(case, rounds) for case, rounds in CASES.items()],
    "counting_ms": lambda: {str(case): counting_ms(case) for case in CASES},
    "tracker_ms": lambda: {
        f"{layers} layers of {experts} experts": round(tracker_ms(layers, experts), 4)
        for layers, experts in ((4, 64), (48, 128))
    },
}


def main(*parts: str) -> None:
    """Measure all parts, or those named, and write numbers and page."""
    torch.set_num_threads(1)
    keep_freed_memory()
    out = ROOT / "benchmarks" / "results" / "monitoring.json"
    found = json.loads(out.read_text(encoding="utf-8")) if parts else {}
    found |= {part: PARTS[part]() for part in parts or PARTS}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(found)
    (ROOT / "docs" / "cost_monitoring.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
