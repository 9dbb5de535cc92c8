"""`moebalance bench`: words become cases, results become tables, JSON and a page."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moebalance.files import write_text
from moebalance.lab.bench.page import write_page
from moebalance.lab.bench.router import Case, measure_routers
from moebalance.lab.bench.scale import measure_scale
from moebalance.lab.bench.step import StepCase, measure_steps
from moebalance.lab.bench.timing import describe_machine
from moebalance.lab.bench.variants import Rule
from moebalance.lab.console import console, say
from moebalance.methods import Method
from moebalance.words.methods import build_method, split_outside_brackets

_RULES: dict[str, Rule] = {
    "softmax": "softmax",
    "normalised": "softmax, normalised",
    "sigmoid": "sigmoid, normalised",
}


def run(
    *,
    methods: str,
    tokens: str,
    sizes: str,
    rules: str,
    device: str,
    threads: int,
    rounds: int,
    step: bool,
    scale: bool,
    out: Path | None,
) -> None:
    """Measure, print and write; arguments as the command takes them."""
    named = {word: build_method(word) for word in split_outside_brackets(methods, ",")}
    _check_device(device)
    cases = _cases(tokens, sizes, rules, device)
    torch.set_num_threads(threads)
    results = measure(cases, named, device=device, rounds=rounds, step=step)
    if scale:
        console.print("64 layers of 512 experts …", style="dim")
        results["scale"] = measure_scale(next(iter(named.values())))
    for row in [*results["routers"], *results["steps"]]:
        console.print(_table(row))
    if out is not None:
        text = json.dumps(results, indent=1, ensure_ascii=False)
        write_text(out.with_suffix(".json"), text + "\n")
        page = write_page(results, out.with_suffix(".md"), plot=out.with_suffix(".svg").name)
        say(f"Page: {page.resolve()}")


def measure(
    cases: list[Case],
    methods: dict[str, Method],
    *,
    device: str = "cpu",
    rounds: int = 31,
    step: bool = False,
) -> dict[str, Any]:
    """All that one run of the command writes as JSON."""

    def tell(case: str) -> None:
        console.print(f"{case} …", style="dim")

    routers = measure_routers(cases, methods, device=device, rounds=rounds, tell=tell)
    steps = []
    if step:
        charging = {name: b for name, b in methods.items() if b.traits.charges}
        sizes = [StepCase(), StepCase(experts=32, top_k=4)]
        steps = measure_steps(sizes, charging, device=device, rounds=rounds, tell=tell)
    machine = describe_machine(device)
    return {"machine": machine, "rounds": rounds, "routers": routers, "steps": steps}


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise ValueError(f"device={device!r}: must be cpu, cuda, or a number of it such as cuda:0.")
    seen = torch.cuda.device_count()
    if kind == "cuda" and int(number or 0) >= seen:
        raise ValueError(f"device={device!r}: torch sees {seen or 'no'} CUDA device here; try cpu.")


def _cases(tokens: str, sizes: str, rules: str, device: str) -> list[Case]:
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    found = []
    for rule in rules.split(","):
        if rule.strip() not in _RULES:
            raise ValueError(f"{rule!r} is no rule; there are {', '.join(_RULES)}.")
        for size in sizes.split(","):
            experts, _, top_k = size.partition(":")
            try:
                counts = [int(count) for count in tokens.split(",")]
                numbers = int(experts), int(top_k)
            except ValueError:
                raise ValueError(
                    f"--tokens {tokens!r} --sizes {size!r}: give whole numbers, such as "
                    "--tokens 8192 --sizes 64:8 for 64 experts and 8 of them per token."
                ) from None
            if min(counts) < 1:
                raise ValueError(f"--tokens {tokens!r}: give at least 1 token.")
            found += [Case(count, *numbers, _RULES[rule.strip()], dtype) for count in counts]
    return found


def _table(row: dict[str, Any]) -> Table:
    table = Table(title=row["case"], title_justify="left")
    counted = "kept" in next(iter(row["variants"].values()))
    for title in ("variant", "time / bare", "quartiles", "ms"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for title in ("bytes per score", "kernels", "kept") if counted else ():
        table.add_column(title, justify="right")
    for name, v in row["variants"].items():
        cells = [
            name,
            f"{v['ratio']:.3f}",
            f"{v['low']:.2f}–{v['high']:.2f}",
            f"{v['time_ms']:.2f}",
        ]
        if counted:
            cells += [f"{v['bytes']:+.2f}", f"{v['kernels'][0]:+d}", f"{v['kept']:.2f}"]
        table.add_row(*cells)
    return table
