"""How the cost of balancing grows with layers, experts, tokens and ranks, with a plan for many.

    a step costs a rank   L · t_batch(T, E)  +  t_end(L, E)  +  t_message(bytes(L, E), P),
    bytes(L, E) = 4 (L (2E + 1) + 2)

The three terms are measured apart, at sizes whose doubling shows how they grow. The message over P
ranks is then extrapolated from what is measured on two: a tree of ⌈log₂ P⌉ hops down and up,

    t(P) = 2 ⌈log₂ P⌉ (latency + bytes / bandwidth),

which a library that pipelines large messages beats.
"""

import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.lab.bench.timing import keep_freed_memory
from moebalance.methods import Method
from moebalance.router import BalancedRouter

LAYERS, EXPERTS, TOKENS = (16, 32, 64), (128, 256, 512), (16384, 32768, 65536)
RANKS = (8, 128, 1024, 10240)
# Of an assumed network, for the plan: cautious beside the 50 GB/s of a card of 400 Gb/s.
HOP_S, BYTES_PER_S = 20e-6, 10e9


def measure_scale(method: Method, *, repeats: int = 5) -> dict[str, Any]:
    """Measure the three terms on this processor.

    Args:
        method: the method.
        repeats: of which the median is taken.

    Returns:
        `batch`: rows of tokens, experts, `added_ms` (to a layer's bare router) and `bare_ms`;
        `end`: rows of layers, experts, `step_ms` and `state_bytes`; `message`: `bytes`, `two_ms`,
        `latency_ms`, `bytes_per_s` (over gloo between two processes here) and `plan`, rows of
        ranks and `message_ms`, for the largest size.
    """
    keep_freed_memory()
    largest = LAYERS[-1], EXPERTS[-1]
    batch = [_batch(method, t, EXPERTS[-1], repeats) for t in TOKENS]
    batch += [_batch(method, TOKENS[-1], e, repeats) for e in EXPERTS[:-1]]
    end = [step_end(method, layers, EXPERTS[-1], repeats) for layers in LAYERS]
    end += [step_end(method, LAYERS[-1], e, repeats) for e in EXPERTS[:-1]]
    return {"method": repr(method), "batch": batch, "end": end, "message": _message(*largest)}


def message_bytes(layers: int, experts: int) -> int:
    """Bytes of a step's one message, metrics over all ranks included."""
    return 4 * (layers * (2 * experts + 1) + 2)


def tree_s(size: int, ranks: int, hop_s: float = HOP_S, bytes_per_s: float = BYTES_PER_S) -> float:
    """Time of an all-reduce of so many bytes by a tree, the whole message at every hop.

    >>> round(1e3 * tree_s(262_404, 1024), 2)
    0.92
    """
    return 2 * math.ceil(math.log2(ranks)) * (hop_s + size / bytes_per_s)


def _batch(method: Method, tokens: int, experts: int, repeats: int) -> dict[str, float]:
    logits = torch.randn(tokens, experts).requires_grad_()
    router = BalancedRouter(method, experts, 8, normalize=False)
    upstream = torch.randn(tokens, 8)

    def balanced() -> None:
        torch.autograd.grad(router(logits, sequences=1)[0], logits, upstream)

    def bare() -> None:
        # In no order, as ours: what is added shall be balancing and nothing else.
        weights, _ = logits.softmax(dim=-1).topk(8, dim=-1, sorted=False)
        torch.autograd.grad(weights, logits, upstream)

    pairs = [(_seconds(balanced), _seconds(bare)) for _ in range(2 * repeats + 1)][1:]
    added = statistics.median(a - b for a, b in pairs)
    plain = statistics.median(b for _, b in pairs)
    sizes = {"tokens": tokens, "experts": experts}
    return {**sizes, "added_ms": round(1e3 * added, 2), "bare_ms": round(1e3 * plain, 2)}


def step_end(method: Method, layers: int, experts: int, repeats: int) -> dict[str, float]:
    """Time of the end of a step, and the memory of the state, of so many layers."""
    held = {str(i): LayerBalance(method, experts) for i in range(layers)}
    balancing = Balancing(method, held)

    def step() -> float:
        for layer in held.values():
            layer.running += torch.rand_like(layer.running)
        return _seconds(balancing.step)

    taken = statistics.median([step() for _ in range(2 * repeats + 2)][2:])
    tensors = [t for layer in held.values() for t in (*layer.buffers(), layer.running)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    sizes = {"layers": layers, "experts": experts}
    return {**sizes, "step_ms": round(1e3 * taken, 3), "state_bytes": size}


def _message(layers: int, experts: int) -> dict[str, Any]:
    size = message_bytes(layers, experts)
    with tempfile.TemporaryDirectory() as folder:
        start = multiprocessing.get_context("spawn")
        sizes = (4, size)
        two = [start.Process(target=_all_reduce, args=(r, folder, sizes)) for r in range(2)]
        for process in two:
            process.start()
        for process in two:
            process.join()
        small, large = torch.load(Path(folder) / "times.pt", weights_only=True)
    bandwidth = size / max(large - small, 1e-9)
    plan = []
    for ranks in RANKS:
        hops = 2 * math.ceil(math.log2(ranks))
        plan.append({"ranks": ranks, "message_ms": round(1e3 * hops * large / 2, 2)})
    return {
        "bytes": size,
        "two_ms": round(1e3 * large, 3),
        "latency_ms": round(1e3 * small, 3),
        "bytes_per_s": round(bandwidth),
        "plan": plan,
    }


def _all_reduce(rank: int, folder: str, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    medians = []
    for size in sizes:
        add_up = partial(dist.all_reduce, torch.zeros(size // 4))
        times = []
        for _ in range(60):
            dist.barrier()
            times.append(_seconds(add_up))
        medians.append(statistics.median(times[10:]))
    if rank == 0:
        torch.save(medians, f"{folder}/times.pt")
    dist.destroy_process_group()


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
