"""What it costs to see: whole training steps with a monitor, next to none.

A small Qwen3-MoE trains on random tokens. Its twins share the parameters; each is watched in
another way, and every round times all of them in an order drawn anew. Next to the bare one stands
itself again, as a null control.

    PYTHONPATH=src python benchmarks/monitoring.py benchmarks/results/monitoring.json
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import moebalance as mb
from moebalance.lab.bench import describe_machine
from moebalance.lab.bench.step import StepCase, build, twin
from moebalance.lab.bench.timing import BARE, NULL, interleaved, keep_freed_memory
from moebalance.lab.trackers import following

CASE = StepCase(tokens=512)
EVERY = 25
"""Steps between snapshots, as in a recipe."""
Step = Callable[[], object]


def measure(case: StepCase = CASE, rounds: int = 9) -> dict[str, object]:
    """Time every variant once a round."""
    keep_freed_memory()
    model = build(case)
    ids = torch.randint(0, 256, (case.tokens // case.length, case.length))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        calls = {name: _bare(twin(model), ids) for name in (BARE, NULL)}
        calls["monitor, metrics only"] = _watched(stack, twin(model), ids, None)
        calls["monitor, run log"] = _watched(stack, twin(model), ids, folder / "log")
        stack.enter_context(following(folder / "shown", ["tensorboard"]))
        calls["monitor, run log, TensorBoard"] = _watched(
            stack, twin(model), ids, folder / "shown" / "run"
        )
        calls["phi"] = _balanced(twin(model), ids, weighed=False)
        calls["phi, gradient ratio"] = _balanced(twin(model), ids, weighed=True)
        timed = interleaved(calls, rounds=rounds)
    sizes = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    variants = {name: asdict(found) for name, found in timed.items()}
    return {"case": str(case), **sizes, "rounds": rounds, "every": EVERY, "variants": variants}


def _bare(model: nn.Module, ids: Tensor) -> Step:
    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    return step


def _watched(stack: ExitStack, model: nn.Module, ids: Tensor, log: Path | None) -> Step:
    monitor = stack.enter_context(mb.monitor(model, log, snapshot_every=EVERY))
    train = _bare(model, ids)

    def step() -> None:
        train()
        monitor.step()

    return step


def _balanced(model: nn.Module, ids: Tensor, *, weighed: bool) -> Step:
    balancing = mb.attach(model, mb.PhiBalancing(strength=0.01))
    balancing.weigh_gradient(weighed)
    train = _bare(model, ids)

    def step() -> None:
        train()
        balancing.step()
        balancing.metrics()

    return step


def main(out: str) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    found = {"machine": describe_machine("cpu"), **measure()}
    for name, timing in found["variants"].items():  # type: ignore[attr-defined]
        low, high = timing["interval"]
        print(f"{name:32} {timing['ratio']:.3f}  ({low:.3f} to {high:.3f})")
    Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
