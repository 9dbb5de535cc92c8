"""Real processes for the tests: a function on N gloo ranks, bounded in time, and its answers."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from forks import FORKS

CRASHES = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
COLLECTIVE_S = 20
"""How long a rank waits in a collective for one that does not come."""


class Failure(str):
    """The answer of a rank that raised, died or hung: what it wrote to stderr and how it ended."""

    @property
    def crashed(self) -> bool:
        """Whether compiled code crashed in it."""
        return self.endswith(tuple(f"(ended with {-number})" for number in CRASHES))


class Collectives(TorchDispatchMode):
    """Names and bytes of all collectives, whichever function asked for them.

    Attributes:
        seen: name and bytes of each, in order.
        others: names of the other operations on tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self.others: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if function.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            size = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
            self.seen.append((name, size))
        else:
            self.others.add(name)
        return function(*args, **(kwargs or {}))


def run(work: Callable[..., Any], ranks: int, *args: Any, limit_s: float = 150) -> list[Any]:
    """Call `work(*args)` on every rank of a new process group; its answers, by rank.

    torch's own compiled code has crashed a rank ("malloc(): unaligned tcache chunk"), once in some
    thirty runs of the suite. Python code of ours cannot, so such a run is done once more.

    Raises:
        AssertionError: a rank raised, died or hung; says how each of them did.
    """
    answers = outcomes(work, ranks, *args, limit_s=limit_s)
    if any(isinstance(a, Failure) and a.crashed for a in answers):
        answers = outcomes(work, ranks, *args, limit_s=limit_s)
    bad = [f"Rank {rank}: {a}" for rank, a in enumerate(answers) if isinstance(a, Failure)]
    assert not bad, "\n".join(bad)
    return answers


def outcomes(work: Callable[..., Any], ranks: int, *args: Any, limit_s: float = 150) -> list[Any]:
    """As `run`, but a rank that raised, died or hung answers with a `Failure`."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            FORKS.Process(target=_rank, args=(rank, ranks, folder, work, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + limit_s
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        answers = []
        for rank, process in enumerate(processes):
            ending = f"ended with {process.exitcode}"
            if process.is_alive():
                ending = f"still running after {limit_s} s"
            process.kill()
            process.join()
            file, words = _files(folder, rank)
            if process.exitcode == 0:
                answers.append(torch.load(file, weights_only=False))
            else:
                answers.append(Failure(f"{words.read_text()}({ending})"))
    return answers


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., Any], args: Any) -> None:
    file, words = _files(folder, rank)
    with words.open("w") as stderr:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=COLLECTIVE_S),
    )
    torch.save(work(*args), file)
    dist.destroy_process_group()


def _files(folder: str, rank: int) -> tuple[Path, Path]:
    """Where a rank leaves its answer, and what it writes to stderr."""
    return Path(folder) / f"{rank}.pt", Path(folder) / f"{rank}.txt"
