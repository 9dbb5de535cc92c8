"""Which layout of a block of rows each fused program is fastest with; for whoever tunes `tile`.

Warps of a program and logits a thread are varied about what `moebalance.kernels.tiling.tile` says,
for every program, width and dtype. Programs are compiled in several processes first, so that a few
minutes of a GPU suffice.

    PYTHONPATH=src python benchmarks/tiles.py results.json
"""

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moebalance import kernels
from moebalance.gates import Softmax
from moebalance.kernels import attached, router
from moebalance.kernels.tiling import Tiling, next_power, tile
from moebalance.lab.bench import describe_machine
from moebalance.lab.bench.timing import BARE, captured, interleaved

TOKENS, TOP_K = 65536, 8
SIZES = (64, 256, 512, 2304)
DTYPES = (torch.bfloat16, torch.float32)
PROGRAMS = ("choose", "pull_back", "count", "pull")
WARPS, PER_THREAD, WAVES = (2, 4), (8, 16, 32), (528, 1056, 1584, 2112)


class Layout(NamedTuple):
    """What is varied; None for what `tile` says."""

    warps: int | None = None
    per_thread: int | None = None
    programs: int | None = None

    def tile(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Tiling:
        """In place of `tile`."""
        usual = tile(logits, *args, **kwargs)
        warps, sizes = self.warps or usual.warps, usual.sizes
        if self.per_thread is not None:
            columns = next_power(logits.shape[1])
            fewest = warps if columns <= 1024 else 1  # a row lies within a warp
            block = max(fewest, warps * 32 * self.per_thread // columns)
            sizes = sizes._replace(block=block)
        return Tiling(sizes, warps, self.programs or usual.programs)


def layouts(program: str) -> Iterator[Layout]:
    """The usual one, then all others."""
    yield Layout()
    for warps, per_thread in product(WARPS, PER_THREAD):
        yield Layout(warps, per_thread)
    if program in ("choose", "count"):
        for programs in WAVES:
            yield Layout(programs=programs)


def calls(
    program: str, experts: int, dtype: torch.dtype, tokens: int, batches: int
) -> list[Callable[[], object]]:
    """The program on several batches, so that none is found in the cache."""
    gate, found = Softmax(), list[Callable[[], object]]()
    top_k = min(TOP_K, experts // 2)
    for _ in range(batches):
        z = torch.randn(tokens, experts, device="cuda").to(dtype)
        chosen = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
        norm, charge = z.float().logsumexp(dim=-1), torch.randn(experts, device="cuda")
        sent = torch.randn(tokens, top_k, device="cuda").to(dtype)
        back = partial(kernels.pull_back, sent, z, chosen, norm, gate)
        found.append(
            {
                "choose": partial(kernels.choose, z, gate, top_k, normalize=True),
                "pull_back": partial(back, normalize=True, charge=charge),
                "count": partial(kernels.count, z, chosen, gate),
                "pull": partial(kernels.pull, z, gate, charge),
            }[program]
        )
    return found


def use(layout: Layout) -> None:
    """Lay out all programs so from now on."""
    router.tile = attached.tile = layout.tile  # type: ignore[assignment]


def compiled(case: tuple[str, int, torch.dtype, Layout]) -> str | None:
    """Compile, in a process of its own; what went wrong, or None."""
    program, experts, dtype, layout = case
    use(layout)
    try:
        calls(program, experts, dtype, 1, 1)[0]()
        torch.cuda.synchronize()
    except Exception as error:  # a layout that does not compile is none
        return repr(error)[:200]
    return None


def main(out: Path, workers: int = 12) -> None:
    """Compile all, time all, print the best and the usual of each, write everything."""
    cases = [
        (program, experts, dtype, layout)
        for program, experts, dtype in product(PROGRAMS, SIZES, DTYPES)
        for layout in layouts(program)
    ]
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, start) as pool:
        wrong = list(pool.map(compiled, cases, chunksize=4))
    rows: list[dict[str, Any]] = []
    for program, experts, dtype in product(PROGRAMS, SIZES, DTYPES):
        size = TOKENS * experts * dtype.itemsize
        batches = calls(program, experts, dtype, TOKENS, max(2, min(8, int(2e8 / size))))
        known: dict[str, Callable[[], object]] = {}
        for case, fault in zip(cases, wrong, strict=True):
            if case[:3] == (program, experts, dtype) and fault is None:
                use(case[3])
                graph = captured(lambda each=batches: [call() for call in each])
                if graph is not None:
                    known[str(tuple(case[3]))] = graph
        usual = str(tuple(Layout()))
        timed = interleaved(
            {BARE if n == usual else n: c for n, c in known.items()}, device="cuda", rounds=7
        )
        times = {n: 1e3 * t.time_ms / len(batches) for n, t in timed.items()}
        best = min(times, key=lambda n: times[n])
        title = f"{program}, E {experts}, {dtype}"
        rows.append({"case": title, "us": {n: round(t, 2) for n, t in times.items()}})
        print(f"{title}: {times[BARE]:.1f} us, best {times[best]:.1f} with {best}", flush=True)
    result = {"machine": describe_machine("cuda"), "rows": rows}
    result["failed"] = [f"{c}: {fault}" for c, fault in zip(cases, wrong, strict=True) if fault]
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
