"""What `attach` adds to a training step of a small Qwen3-MoE, on this machine.

One model serves all variants, so that they differ in nothing else: a step of forward, backward and
`Balancing.step()` with φ attached, without, and without once more as the null control, in turn.
Prints the median ratio to the bare step with its quartiles, and writes them as JSON.

    python benchmarks/attach_overhead.py [results.json]
"""

import json
import platform
import statistics
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moebalance as mb

ROUNDS = 15
CASES = ((4096, 32, 4), (4096, 64, 8))  # tokens, experts, K


def build(experts: int, top_k: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config).train()
    model.set_experts_implementation("grouped_mm")
    return model


def step_time_s(model: PreTrainedModel, ids: torch.Tensor, balancer: mb.Balancer | None) -> float:
    balancing = None if balancer is None else mb.attach(model, balancer)
    model.zero_grad()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    if balancing is not None:
        balancing.step()
    taken = time.perf_counter() - start
    if balancing is not None:
        balancing.detach()
    return taken


def measure(tokens: int, experts: int, top_k: int) -> dict[str, dict[str, float]]:
    model = build(experts, top_k)
    ids = torch.randint(0, 256, (tokens // 256, 256))
    variants = {"bare": None, "bare again (null control)": None, "φ-balancing": mb.PhiBalancing()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 2):
        for name, balancer in variants.items():
            taken = step_time_s(model, ids, balancer)
            if turn >= 2:
                times[name].append(taken)
    found = {}
    for name, measured in times.items():
        ratios = [t / b for t, b in zip(measured, times["bare"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ratio": round(middle, 4),
            "quartile_low": round(low, 4),
            "quartile_high": round(high, 4),
            "time_ms": round(1e3 * statistics.median(measured), 1),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {
        "rounds": ROUNDS,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "moebalance": mb.__version__,
        "cases": {f"T{t} E{e} K{k}": measure(t, e, k) for t, e, k in CASES},
    }
    for case, rows in results["cases"].items():
        print(case)
        for name, row in rows.items():
            print(f"  {name:28} {row['ratio']:.3f}  ({row['time_ms']:.0f} ms)")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1, ensure_ascii=False)
