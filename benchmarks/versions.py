"""The router of two checkouts, timed in one run: is the new one slower anywhere?

    git worktree add --detach build/old COMMIT
    python benchmarks/versions.py build/old/src src

Every case has one process a checkout, and the new checkout a second one, whose distance from the
first is noise. A round asks each of them once, in an order drawn anew. Prints a Markdown table of
old against new: the median ratio of times in the same round, with its quartiles.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

METHODS = ("NoBalancing", "PhiBalancing", "SwitchLoss", "LossFree")
CASES = ((8, 2), (64, 8), (256, 8))
# Of glibc: without it page faults are most of what is timed.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
}
TOKENS, ROUNDS = 8192, 31


class Served:
    """A process that times one router of one checkout whenever it is asked."""

    def __init__(self, source: str, *case: object) -> None:
        command = [sys.executable, __file__, "--serve", source, *map(str, case)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **KEEP_FREED_MEMORY},
        )

    def __call__(self) -> float:
        """Seconds of one forward and backward."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def answered(served: Callable[[], object], _: int) -> float:
    """The seconds that a process tells."""
    seconds = served()
    assert isinstance(seconds, float)
    return seconds


def serve(source: str, name: str, experts: int, top_k: int) -> None:
    """Answer each line with the seconds of one forward and backward."""
    sys.path.insert(0, source)
    import torch

    import moebalance

    assert Path(moebalance.__file__).is_relative_to(Path(source).resolve()), moebalance.__file__
    torch.set_num_threads(1)
    router: Any = moebalance.BalancedRouter(getattr(moebalance, name)(), experts, top_k)
    logits = torch.randn(TOKENS, experts, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    upstream = torch.ones(TOKENS, top_k)
    for _ in sys.stdin:
        start = time.perf_counter()
        torch.autograd.grad(router(logits)[0], logits, upstream)
        print(time.perf_counter() - start, flush=True)


def compare(old: str, new: str) -> None:
    """Print the table."""
    from moebalance.lab.bench.timing import BARE, interleaved

    print("| T 8192 | new / old | quartiles | new / new | quartiles | new, ms |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in METHODS:
        for experts, top_k in CASES:
            case = (name, experts, top_k)
            # The first is what the others are divided by.
            found = {}
            for against, source in (("old", old), ("new", new)):
                pair = {BARE: Served(source, *case), "new": Served(new, *case)}
                timed = interleaved(pair, rounds=ROUNDS, clock=answered)
                found[against] = timed["new"]
                for one in pair.values():
                    one.close()
            cells = [f"{t.ratio:.3f} | {t.low:.2f}–{t.high:.2f}" for t in found.values()]
            ms = found["old"].time_ms
            print(
                f"| {name}, E {experts}, K {top_k} | {' | '.join(cells)} | {ms:.2f} |", flush=True
            )


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        compare(*sys.argv[1:3])
