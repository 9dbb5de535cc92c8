"""Everything that only a GPU can tell, in one unattended run of under nine minutes.

Each part runs in a process of its own with a time limit, and results are written after each, so
that what fails takes nothing else with it:

    correct   the fused router against its plain form in float64
    silent    no wait for the device in a training step, and capture into a CUDA graph
    router    every method beside a bare router and its rivals, at 16 and 64 thousand tokens
    on        φ beside the same fused router that only counts
    speed     bandwidth of the fused passes
    step      a whole training step of a Transformers model, with 95 % intervals

Times are the device's own: replays of a CUDA graph, or launches without a gap between them. The
router's part also has the time with the host in it, as eager training has where it waits for none.

    PYTHONPATH=src python benchmarks/gpu.py [results.json [part …]]

Where the source tree comes without its history, COMMIT in the environment says which one it is.
Results go to benchmarks/results/gpu.json if no file is named. Their `targets` say in a line
each what was to be reached and what was.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import moebalance as mb
from moebalance import kernels
from moebalance.gates import Gate, Sigmoid, Softmax
from moebalance.lab.bench import Case, StepCase, describe_machine, measure_routers, measure_steps
from moebalance.lab.bench.timing import BARE, NULL, captured, interleaved
from moebalance.lab.bench.variants import Ours

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = DEVICE == "cpu"  # a rehearsal, by Triton's interpreter, of everything but the numbers
LIMIT_S = {"correct": 90, "silent": 40, "router": 180, "on": 50, "speed": 50, "step": 120}
METHODS = {
    "φ": mb.PhiBalancing(),
    "Switch": mb.SwitchLoss(),
    "loss-free": mb.LossFree(),
    "none": mb.NoBalancing(),
    "recommended": mb.recommended(),
}


def correct() -> dict[str, Any]:
    """Largest error of weights, sums and gradient, each over the largest value."""
    rows = []
    sizes = ((8, 2), (60, 4), (64, 8)) if SMALL else ((8, 2), (60, 4), (64, 8), (256, 8), (2304, 8))
    for experts, top_k in sizes:
        for gate in (Softmax(), Sigmoid()):
            for dtype in (torch.float32, torch.bfloat16):
                rows.append(_compare(experts, top_k, gate, dtype))
    for dtype in (torch.float32, torch.bfloat16):  # as DeepSeek-V3 chooses
        rows.append(
            _compare(64 if SMALL else 256, 8, Sigmoid(), dtype, mb.GroupLimit(8, top_groups=4))
        )
    return {"commit": _commit(), "rows": rows}


def _compare(
    experts: int,
    top_k: int,
    gate: Gate,
    dtype: torch.dtype,
    limit: mb.GroupLimit | None = None,
) -> dict[str, Any]:
    tokens = 33 if SMALL else 4097
    torch.manual_seed(0)
    logits = torch.randn(tokens, experts, device=DEVICE).to(dtype)
    mask = torch.rand(tokens, device=DEVICE) > 0.2
    charge = torch.randn(experts, device=DEVICE) / tokens
    upstream = torch.randn(tokens, top_k, device=DEVICE).to(dtype) / tokens
    price = None if limit is None else torch.rand(experts, device=DEVICE) / 10
    how: dict[str, Any] = {"normalize": True, "price": price, "limit": limit, "mask": mask}
    found = kernels.choose(logits, gate, top_k, **how)
    gradient = kernels.pull_back(
        upstream,
        logits,
        found.experts,
        found.normaliser,
        gate,
        normalize=True,
        charge=charge,
        mask=mask,
    )
    counted = kernels.count(logits, found.experts, gate, mask=mask)
    charged = kernels.pull(logits, gate, charge, mask=mask)
    wide = logits.double().requires_grad_()
    plain = kernels.plain.choose(wide, gate, top_k, **how)
    value = (plain.weights * upstream).sum() + (plain.packed[:experts] * charge).sum()
    (expected,) = torch.autograd.grad(value, wide)
    alone = kernels.plain.pull(wide.detach(), gate, charge.double(), mask=mask)
    alike = (found.experts == plain.experts).all(dim=-1)  # bfloat16 ties may fall either way
    return {
        "case": f"E {experts}, K {top_k}, {type(gate).__name__}, {dtype}"
        + ("" if limit is None else f", {limit}"),
        "weights": _error(found.weights[alike], plain.weights[alike]),
        "sums": _error(found.packed[:experts], plain.packed[:experts]),
        "gradient": _error(gradient[alike], expected[alike]),
        "attached sums": _error(counted, found.packed),
        "attached gradient": _error(charged, alone),
        "other_choice": (~alike).double().mean().item(),
    }


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def silent() -> dict[str, str]:
    """Whether a training step waits for the device, and whether a router can be captured."""
    if SMALL:
        return {"skipped": "no CUDA device"}
    logits = torch.randn(4096, 64, device=DEVICE, requires_grad=True)
    router = mb.BalancedRouter(mb.PhiBalancing(), 64, 8).to(DEVICE)
    balancing = mb.attach(router)

    def batch() -> None:
        logits.grad = None
        router(logits)[0].sum().backward()

    for _ in range(3):
        batch()
        balancing.step()
    torch.cuda.set_sync_debug_mode("error")
    batch()
    balancing.reduce()
    balancing.step()
    torch.cuda.set_sync_debug_mode("default")
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        batch()
    torch.cuda.synchronize()
    balancing.discard()
    logits.grad = None
    with torch.cuda.graph(graph):
        router(logits)[0].sum().backward()
    balancing.discard()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    counted = int(router.running[128].item())
    assert counted == 3 * 4096, counted
    return {"waits in a step": "none", "three replays of a CUDA graph count": f"{counted} tokens"}


def router() -> list[dict[str, Any]]:
    """The router cases of the benchmark."""
    sizes = ((16, 4),) if SMALL else ((8, 2), (64, 8), (256, 8), (512, 8))
    counts = (64,) if SMALL else (16384, 65536)
    cases = [
        Case(tokens, experts, top_k, rule, dtype)
        for experts, top_k in sizes
        for tokens in counts
        for rule in ("softmax", "sigmoid, normalised")
        for dtype in (torch.float32, torch.bfloat16)
        if tokens == counts[-1] or dtype == torch.bfloat16
    ]
    return measure_routers(cases, METHODS, device=DEVICE, rounds=2 if SMALL else 21, tell=print)


def on() -> list[dict[str, Any]]:
    """A training batch of one fused router, with φ and with counting alone as the bare one."""
    sizes, counts = (((16, 4),), (64,)) if SMALL else (((64, 8), (256, 8)), (16384, 65536))
    cases = [
        Case(tokens, experts, top_k, rule, dtype)
        for experts, top_k in sizes
        for tokens in counts
        for rule in ("softmax", "softmax, normalised")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return [_compare_on(case) for case in cases]


def _compare_on(case: Case) -> dict[str, Any]:
    logits = torch.randn(case.tokens, case.experts, device=DEVICE).to(case.dtype).requires_grad_()
    upstream = torch.randn(case.tokens, case.top_k, device=DEVICE).to(case.dtype)

    def batch(name: str) -> Callable[[], object]:
        ours = Ours(METHODS[name], case.experts, case.top_k, case.rule)
        ours.router.to(DEVICE)
        return _replayed([lambda: torch.autograd.grad(ours(logits)[0], logits, upstream)])

    calls = {BARE: batch("none"), NULL: batch("none"), "φ": batch("φ")}
    rounds, repeats = (2, 1) if SMALL else (41, 20)
    timed = interleaved(calls, device=DEVICE, rounds=rounds, repeats=repeats)
    return {"case": str(case), "variants": {name: asdict(found) for name, found in timed.items()}}


def speed() -> list[dict[str, Any]]:
    """Time and bandwidth of the fused passes: logits read, where they are written their gradient.

    Over several batches in turn, so that none is found in the cache.
    """
    rows = []
    for experts, top_k in ((64, 8), (256, 8), (512, 8), (2304, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            tokens, gate = 16 if SMALL else 65536, Softmax()
            charge = torch.randn(experts, device=DEVICE)
            size = tokens * experts * dtype.itemsize
            calls: dict[str, list[Callable[[], object]]] = {
                name: [] for name in ("choose", "pull_back", "count", "pull")
            }
            for _ in range(1 if SMALL else max(2, min(12, int(4e8 / size)))):
                z = torch.randn(tokens, experts, device=DEVICE).to(dtype)
                u = torch.randn(tokens, top_k, device=DEVICE).to(dtype)
                f = kernels.choose(z, gate, top_k, normalize=True)
                calls["choose"].append(partial(kernels.choose, z, gate, top_k, normalize=True))
                back = partial(kernels.pull_back, u, z, f.experts, f.normaliser, gate)
                calls["pull_back"].append(partial(back, normalize=True, charge=charge))
                calls["count"].append(partial(kernels.count, z, f.experts, gate))
                calls["pull"].append(partial(kernels.pull, z, gate, charge))
            row: dict[str, Any] = {"case": f"T {tokens}, E {experts}, K {top_k}, {dtype}"}
            for name, each in calls.items():
                replay = _replayed(each)
                taken_s = _time_s(replay) / len(each)
                passes = 2 if name.startswith("pull") else 1
                row[name] = {
                    "us": round(1e6 * taken_s, 1),
                    "tb_per_s": round(passes * size / taken_s / 1e12, 3),
                }
            rows.append(row)
    return rows


def _replayed(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """All of them in one CUDA graph."""

    def every() -> None:
        for call in calls:
            call()

    if SMALL:
        return every
    graph = captured(every)
    assert graph is not None
    return graph


def _time_s(call: Callable[[], object]) -> float:
    bare = interleaved({BARE: call}, device=DEVICE, rounds=2 if SMALL else 15)
    return bare[BARE].time_ms / 1e3


def step() -> list[dict[str, Any]]:
    """Whole training steps."""
    cases = [StepCase(tokens=64, experts=4, top_k=2, layers=1, hidden=16, length=16)]
    if not SMALL:
        cases = [
            StepCase(tokens, 128, 8, layers=4, hidden=2048, length=2048, dtype=torch.bfloat16)
            for tokens in (16384, 32768)
        ]
    methods = {"φ": METHODS["φ"]}
    return measure_steps(cases, methods, device=DEVICE, rounds=2 if SMALL else 61, tell=print)


def _commit() -> str:
    return os.environ.get("COMMIT") or str(describe_machine(DEVICE)["commit"])


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, and what was, of the parts that there are: worst case first."""
    found = []

    def add(what: str, target: str, part: str, value: Callable[[Any], float | None]) -> None:
        rows = results.get(part)
        if not isinstance(rows, list):
            return
        values = {row["case"]: value(row) for row in rows}
        known = {case: round(v, 4) for case, v in values.items() if v is not None}
        if known:
            worst = max(known, key=lambda case: known[case] * (1 if target[0] == "≤" else -1))
            line = {"what": what, "target": target, "worst": known[worst], "at": worst}
            found.append({**line, "all": known})

    def on_device(name: str) -> Callable[[Any], float | None]:
        return lambda row: (row["variants"][name].get("device") or {}).get("ratio")

    def theirs_over_ours(row: Any) -> float | None:
        theirs, ours = (
            on_device(name)(row) if name in row["variants"] else None
            for name in ("Transformers' function", "φ, attached")
        )
        # Below a thousandth it is noise.
        return (theirs - 1) / max(ours - 1, 1e-3) if theirs and ours else None

    add("φ over counting alone, fused", "≤ 1.02", "on", lambda r: r["variants"]["φ"]["ratio"])
    add("fused φ over the bare router, on the device", "≤ 0.5", "router", on_device("φ"))
    add(
        "fused φ over the bare router, with the host that starts it",
        "≤ 0.5",
        "router",
        lambda r: r["variants"]["φ"]["ratio"],
    )
    add("what Transformers' function adds over φ attached", "≥ 20", "router", theirs_over_ours)
    add("backward, TB/s", "≥ 2.2", "speed", lambda r: r["pull_back"]["tb_per_s"])
    add(
        "a whole step with φ, upper end of its 95 % interval",
        "≤ 1.001",
        "step",
        lambda r: r["variants"]["φ"]["interval"][1],
    )
    return found


PARTS: dict[str, Callable[[], Any]] = {
    "correct": correct,
    "silent": silent,
    "router": router,
    "on": on,
    "speed": speed,
    "step": step,
}


def main(out: Path, parts: list[str]) -> None:
    """Run the parts in processes of their own, and write what there is after each."""
    versions = {name: version(name) for name in ("triton", "transformers") if find_spec(name)}
    machine = {**describe_machine(DEVICE), "cuda": torch.version.cuda, **versions}
    machine["commit"] = _commit()
    results: dict[str, Any] = {"machine": machine, "rounds": 21}
    out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        print(f"{part}: at most {LIMIT_S[part]} s", flush=True)
        file = out.with_name(f"{out.stem}.{part}.json")
        command = [sys.executable, __file__, "--part", part, str(file)]
        start = time.perf_counter()
        try:
            done = subprocess.run(command, timeout=LIMIT_S[part], check=False)
            reason = f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {LIMIT_S[part]} s"
        results[part] = json.loads(file.read_text()) if file.exists() else {"failed": reason}
        file.unlink(missing_ok=True)
        print(f"{part}: {reason}, {time.perf_counter() - start:.0f} s", flush=True)
        results["targets"] = targets(results)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        found = PARTS[sys.argv[2]]()
        Path(sys.argv[3]).write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    else:
        default = Path(__file__).parent / "results" / "gpu.json"
        main(Path(sys.argv[1]) if sys.argv[1:] else default, sys.argv[2:] or list(PARTS))
