"""What balancing adds to one router, forward and backward, on this machine.

Every variant runs once a round, in turn, so that drift hits all alike; a second bare router is the
null control. Prints the median ratio to the bare router and its quartiles, and writes them as JSON.

    python benchmarks/router_cost.py [results.json]
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moebalance as mb
from moebalance.layer import LayerBalance

TOKENS, ROUNDS = 8192, 41
CASES = ((8, 2), (64, 8), (256, 8))


def bare(logits: Tensor, top_k: int) -> Tensor:
    weights, _ = logits.softmax(dim=-1).topk(top_k, dim=-1)
    return weights.sum()


def transformers_loss(logits: Tensor, top_k: int) -> Tensor:
    term = load_balancing_loss_func((logits,), logits.shape[-1], top_k)
    return bare(logits, top_k) + 1e-2 * term


def balanced(balancer: mb.Balancer, experts: int) -> Callable[[Tensor, int], Tensor]:
    layer = LayerBalance(balancer, experts)

    def forward(logits: Tensor, top_k: int) -> Tensor:
        weights, chosen = logits.softmax(dim=-1).topk(top_k, dim=-1)
        return layer.inject(weights, logits, chosen).sum()

    return forward


def measure(experts: int, top_k: int) -> dict[str, dict[str, float]]:
    variants = {
        "bare": bare,
        "bare again (null control)": bare,
        "counting only": balanced(mb.NoBalancing(), experts),
        "Switch": balanced(mb.SwitchLoss(), experts),
        "φ-balancing": balanced(mb.PhiBalancing(), experts),
        "Transformers' loss function": transformers_loss,
    }
    logits = nn.Parameter(torch.randn(TOKENS, experts))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 3):
        for name, forward in variants.items():
            logits.grad = None
            start = time.perf_counter()
            forward(logits, top_k).backward()
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
    found = {}
    for name, measured in times.items():
        ratios = [t / b for t, b in zip(measured, times["bare"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ratio": round(middle, 3),
            "quartile_low": round(low, 3),
            "quartile_high": round(high, 3),
            "time_ms": round(1e3 * statistics.median(measured), 3),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {
        "tokens": TOKENS,
        "rounds": ROUNDS,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "moebalance": mb.__version__,
        "cases": {f"E{e} K{k}": measure(e, k) for e, k in CASES},
    }
    for case, rows in results["cases"].items():
        print(case)
        for name, row in rows.items():
            print(f"  {name:28} {row['ratio']:.2f}  ({row['time_ms']:.2f} ms)")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1, ensure_ascii=False)
