"""Every method for 100,000 steps: whether its state stays finite, and how far float32 drifts.

    PYTHONPATH=src:tests python benchmarks/long_life.py          # twenty minutes of a processor
    PYTHONPATH=src:tests python benchmarks/long_life.py --page   # writes docs/long_life.md

*Open*: the same loads come whatever the state says, eight kinds at once, a row each. Float32 and
float64 see the same numbers, so their states can be compared. *Closed*: a router chooses under the
method's price from logits that are constant, or favour one expert by 8 nats and change it.
Methods whose states are equal bit for bit after 50 steps are run once.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from cases import METHODS, plain_top_k, tensors, to_double
from moebalance.gates import Softmax
from moebalance.methods import Method, observe
from moebalance.routing import Sums, route

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "long_life.json"
PAGE = ROOT / "docs" / "long_life.md"

STEPS = 100_000
EXPERTS, TOP_K, PERIOD = 8, 2, 200
WORKERS = 3
OPEN = (
    "even",
    "skewed",
    "two experts get all",
    "extremes in turn",
    "random",
    "one step in 20 has tokens",
    "one token a step",
    "ten million tokens a step",
)
CLOSED = ("constant logits", "the favourite changes")
MARKS = (1_000, 10_000, 100_000)
"""Steps after which the largest price is kept."""


class Life(NamedTuple):
    """What came of a method.

    Attributes:
        finite: whether all states were finite, at every 1000th step.
        largest: absolute value in the state at the end, by kind of load.
        prices: largest absolute selection price at the `MARKS`, by kind of load.
        drift: largest difference of float32 from float64 at the end, by kind of load, relative to
            the larger of 1 and the value; empty where float64 sees other choices.
    """

    finite: bool
    largest: dict[str, float]
    prices: dict[str, list[float]]
    drift: dict[str, float]


@cache
def loads() -> tuple[Tensor, Tensor]:
    """Counts (PERIOD, rows, E) and tokens (PERIOD, rows), float64."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((PERIOD, len(OPEN)), 4096.0, dtype=torch.float64)
    parts = torch.full((PERIOD, len(OPEN), EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    parts[:, 1] = torch.arange(1, EXPERTS + 1, dtype=torch.float64) / 36
    parts[:, 2] = torch.tensor([0.5, 0.5] + [0.0] * 6)
    parts[0::2, 3] = torch.tensor([0.5, 0.5] + [0.0] * 6)
    parts[1::2, 3] = torch.tensor([0.0] * 6 + [0.5, 0.5])
    parts[:, 4] = torch.rand(PERIOD, EXPERTS, generator=generator).double().softmax(-1)
    parts[:, 5] = parts[:, 4].flip(0)
    tokens[:, 5] = torch.where(torch.arange(PERIOD) % 20 == 0, 4096.0, 0.0)
    tokens[:, 6], tokens[:, 7] = 1, 1e7
    parts[:, 6] = 0.0
    parts[:, 6, :2] = 0.5
    parts[:, 7] = parts[:, 1]
    return parts * tokens.unsqueeze(-1) * TOP_K, tokens


@cache
def histograms(method: Method) -> tuple[Tensor, ...]:
    """The method's own sums (PERIOD, rows, …), of random routings from its first state."""
    if not method.extra_shapes(EXPERTS):
        return ()
    state, found = method.init(EXPERTS), []
    for seed in range(20):
        logits = torch.randn(64, EXPERTS, generator=torch.Generator().manual_seed(seed))
        found.append(observe(method, state, plain_top_k(logits, TOP_K)).extra)
    return tuple(
        torch.stack(part).repeat(PERIOD // 20, *[1] * (part[0].dim())).unsqueeze(1)
        for part in zip(*found, strict=True)
    )


def open_sums(method: Method, step: int, dtype: torch.dtype) -> Sums:
    """The sums of a step, a row for each kind of load."""
    counts, tokens = loads()
    at = step % PERIOD
    extra = [part[at].to(dtype).expand(len(OPEN), *part.shape[2:]) for part in histograms(method)]
    now = counts[at].to(dtype)
    return Sums(now / TOP_K, now, tokens[at].to(dtype), tuple(extra))


def live_open(method: Method, steps: int, dtype: torch.dtype) -> Iterator[tuple[int, Any]]:
    """The states (rows, …) after the last step and after those worth a look."""
    period = [open_sums(method, step, dtype) for step in range(PERIOD)]
    state = method.init(EXPERTS)
    state = state if dtype == torch.float32 else to_double(state)
    state = tree_map(lambda x: x.expand(len(OPEN), *x.shape).clone(), state)
    yield from _live(torch.vmap(method.update), state, period, steps)


def live_closed(method: Method, kind: str, steps: int) -> Iterator[tuple[int, Any]]:
    """The same of a router that obeys the price."""
    gate = Softmax()
    fixed = torch.randn(16, EXPERTS, generator=torch.Generator().manual_seed(1))

    def step(state: Any, logits: Tensor) -> Any:
        ranked = method.preference(state, gate, logits, mask=None, training=True)
        experts = (logits if ranked is None else ranked).topk(TOP_K).indices
        return method.update(state, observe(method, state, route(logits, experts, gate)))

    favoured = [fixed]
    if kind != CLOSED[0]:
        favoured = [fixed + 8.0 * torch.eye(EXPERTS)[i // 500] for i in range(500 * EXPERTS)]
    yield from _live(step, method.init(EXPERTS), favoured, steps)


def _live(
    step: Callable[[Any, Any], Any], state: Any, given: Sequence[Any], steps: int
) -> Iterator[tuple[int, Any]]:
    """Step after step, with what is given in turn; as a graph, which spares Python's time."""
    if not tree_leaves(state):
        yield steps, state
        return
    leaves, form = tree_flatten(state)
    inputs = [tree_leaves(each) for each in given]
    _, shape = tree_flatten(given[0])

    def flat(*tensors: Tensor) -> list[Tensor]:
        old, new = list(tensors[: len(leaves)]), list(tensors[len(leaves) :])
        return tree_leaves(step(tree_unflatten(old, form), tree_unflatten(new, shape)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather export, which costs Python each step
        graph = make_fx(lambda *tensors: flat(*tensors))(*leaves, *inputs[0])
        run = torch.jit.freeze(torch.jit.trace(graph, (*leaves, *inputs[0])).eval())
        for number in range(1, steps + 1):
            leaves = run(*leaves, *inputs[(number - 1) % len(inputs)])
            if number % 1000 == 0 or number == steps:
                yield number, tree_unflatten(list(leaves), form)


def life(method: Method, steps: int, *, closed: bool) -> Life:
    """What becomes of a method in so many steps."""
    finite, largest, drift = True, {}, {}
    prices: dict[str, list[float]] = {}
    state: Any = ()
    for step, state in live_open(method, steps, torch.float32):
        finite &= all(bool(x.isfinite().all()) for x in tensors(state))
        for price in held_prices(state) if step in MARKS else ():
            for kind, most in zip(OPEN, price.abs().amax(-1).tolist(), strict=True):
                prices.setdefault(kind, []).append(most)
    *_, (_, exact) = live_open(method, steps, torch.float64)
    for row, kind in enumerate(OPEN):
        pairs = [(a[row], b[row]) for a, b in zip(tensors(state), tensors(exact), strict=True)]
        largest[kind] = max((a.abs().max().item() for a, _ in pairs), default=0.0)
        drift[kind] = max((_off(a, b) for a, b in pairs), default=0.0)
    for kind in CLOSED if closed and held_prices(state) else ():
        for step, state in live_closed(method, kind, steps):
            finite &= all(bool(x.isfinite().all()) for x in tensors(state))
            for price in held_prices(state) if step in MARKS else ():
                prices.setdefault(kind, []).append(price.abs().max().item())
        largest[kind] = max(x.abs().max().item() for x in tensors(state))
    return Life(finite, largest, prices, drift)


def held_prices(state: Any) -> list[Tensor]:
    """The prices on the choice that a state integrates."""
    if isinstance(state, Tensor):
        return []
    if "price" in getattr(state, "_fields", ()):
        return [state.price]
    return [price for part in state for price in held_prices(part)]


def distinct() -> dict[str, tuple[Method, list[str]]]:
    """Methods with a state, and the names of others that have the same one."""
    found: dict[bytes, tuple[str, Method, list[str]]] = {}
    for name, method in METHODS.items():
        (*_, (_, state)) = live_open(method, 50, torch.float32)
        if not tensors(state):
            continue
        key = b"".join(x.contiguous().numpy().tobytes() for x in tensors(state))
        key += str(method.traits.selects).encode()
        found.setdefault(key, (name, method, []))[2].append(name)
    return {name: (method, names) for name, method, names in found.values()}


def _off(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).abs() / b.abs().clamp(min=1.0)).max().item()


def page(results: dict[str, Any]) -> str:
    """docs/long_life.md."""
    lines = [
        "| method | finite | largest value | float32 against float64 |",
        "|---|---|---|---|",
    ]
    growth = [
        "| method | load | " + " | ".join(f"{n:,} steps" for n in MARKS) + " |",
        "|---|---|---|---|---|",
    ]
    for name, row in results["lives"].items():
        same = len(row["names"]) - 1
        also = f" (and {same} more)" if same else ""
        worst = max(row["drift"], key=row["drift"].get)
        most = max(row["largest"], key=row["largest"].get)
        yes = "yes" if row["finite"] else "NO"
        lines.append(
            f"| {name}{also} | {yes} | {_shown(row['largest'][most])} ({most}) | "
            f"{row['drift'][worst]:.1e} ({worst}) |"
        )
        for kind, prices in row["prices"].items():
            if kind in ("skewed", "extremes in turn", *CLOSED):
                numbers = " | ".join(map(_shown, prices))
                growth.append(f"| {name} | {kind} | {numbers} |")
    text = (ROOT / "benchmarks" / "long_life.md").read_text(encoding="utf-8")
    return text.format(
        steps=f"{results['steps']:,}",
        stateless=results["stateless"],
        lives="\n".join(lines),
        growth="\n".join(growth),
    )


def _shown(number: float) -> str:
    return f"{number:.3g}" if not 1000 <= number < 1e6 else f"{number:,.0f}"


def main() -> None:
    """Run all and write results; or the page from them."""
    if "--page" in sys.argv:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        PAGE.write_text(page(results), encoding="utf-8")
        return
    different = distinct()
    with_state = sum(len(names) for _, names in different.values())
    lives: dict[str, Any] = {}
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        for name, found in zip(different, pool.map(whole_life, different), strict=True):
            lives[name] = {"names": different[name][1], **found._asdict()}
            results = {"steps": STEPS, "stateless": len(METHODS) - with_state, "lives": lives}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(name, found, flush=True)


def whole_life(name: str) -> Life:
    """All steps of a method, in a process of its own."""
    torch.set_num_threads(1)
    with torch.no_grad():
        return life(METHODS[name], STEPS, closed=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
