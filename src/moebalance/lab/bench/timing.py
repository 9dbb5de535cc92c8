"""Interleaved timing with a null control, on a processor or a CUDA device."""

import ctypes
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import moebalance

BARE, NULL = "bare", "bare again (null control)"


@dataclass(frozen=True)
class Timing:
    """One variant against the bare one, over rounds.

    Attributes:
        ratio: median of time / time of the bare variant in the same round.
        low: first quartile of the ratios.
        high: third quartile.
        interval: 95 % bootstrap interval of the median ratio.
        time_ms: median time of one call, forward and backward.
    """

    ratio: float
    low: float
    high: float
    interval: tuple[float, float]
    time_ms: float


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeats: int = 1,
    device: str = "cpu",
    seed: int = 0,
    clock: Callable[[Callable[[], object], int], float] | None = None,
) -> dict[str, Timing]:
    """Time every variant once a round, in an order drawn anew for each.

    Args:
        variants: what to call, by name; one is named `BARE`.
        rounds: rounds counted; two more go before them.
        repeats: calls timed together as one, for short kernels.
        device: "cpu" or a CUDA device, whose own clock is read.
        seed: of the orders.
        clock: seconds of a call that is repeated so often; the device's own by default.
    """
    clock = clock or (_cuda_time_s if device.startswith("cuda") else _host_time_s)
    order, times = list(variants), {name: list[float]() for name in variants}
    shuffle = random.Random(seed).shuffle
    for turn in range(rounds + 2):
        shuffle(order)
        for name in order:
            taken = clock(variants[name], repeats)
            if turn >= 2:
                times[name].append(taken)
    return {name: _against(times[name], times[BARE]) for name in variants}


def captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """The replay of a CUDA graph of `call`: what the device does, without the host that starts it.

    None if `call` waits for the device or cannot be captured for another reason.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        return None
    return graph.replay


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed, as a process in mid-training does anyway.

    Otherwise each (T, E) tensor is mapped and unmapped, and page faults are most of what is timed.
    Returns False where the C library knows no such setting; the noise is then larger.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    return bool(set_option(mmap, 1 << 30) and set_option(trim, (1 << 31) - 1))


def describe_machine(device: str) -> dict[str, Any]:
    """What numbers must be read with: device, threads, versions, commit, and who else is there."""
    cuda = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moebalance": moebalance.__version__,
        "commit": _commit(),
        "others": dict(_installed(["transformers", "megatron-core", "torchtitan"])),
    }


def _installed(packages: Iterable[str]) -> Iterator[tuple[str, str]]:
    for package in packages:
        with suppress(PackageNotFoundError):
            yield package, version(package)


def _against(times: list[float], bare: list[float]) -> Timing:
    ratios = [t / b for t, b in zip(times, bare, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    interval = round(medians[25], 5), round(medians[974], 5)
    time_ms = round(1e3 * statistics.median(times), 4)
    return Timing(round(middle, 5), round(low, 4), round(high, 4), interval, time_ms)


def _host_time_s(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _cuda_time_s(call: Callable[[], object], repeats: int) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    taken_ms: float = start.elapsed_time(end)
    return taken_ms / 1e3 / repeats


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the source tree this runs from; empty for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
