"""Run logs made from arithmetic: what the report sees, without training anything."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moebalance import methods, potentials
from moebalance.methods.describe import describe
from moebalance.report import summarise
from moebalance.runlog import LOG_NAME, Run, RunLog
from moebalance.words.methods import build_method

# method: (validation loss, MaxVio, dead experts, MI, time of a step in seconds)
METHODS: dict[str, tuple[float, float, int, float, float]] = {
    "phi": (1.599, 0.90, 0, 0.65, 0.104),
    "phi+loss-free": (1.595, 0.26, 0, 0.60, 0.106),
    "switch": (1.609, 0.25, 0, 0.05, 0.102),
    "global-batch": (1.606, 0.28, 0, 0.24, 0.102),
    "sequence": (1.611, 0.41, 0, 0.10, 0.105),
    "ema-switch": (1.603, 0.34, 0, 0.35, 0.103),
    "plug-in": (1.612, 0.37, 0, 0.08, 0.102),
    "loss-free": (1.607, 0.23, 0, 0.80, 0.101),
    "quantile": (1.604, 0.31, 0, 0.55, 0.118),
    "sinkhorn": (1.615, 0.52, 1, 0.30, 0.139),
    "z-loss": (1.634, 4.05, 15, 0.50, 0.101),
    "none": (1.637, 4.34, 17, 0.53, 0.100),
}
REPRS = {
    "phi": "PhiBalancing(potential=NegativeEntropy(), strength=0.001, rate=0.3)",
    "switch": "SwitchLoss(strength=0.01)",
    "none": "NoBalancing()",
}
DOMAINS = ("code", "prose", "dialogue", "tables")
# Evaluations, one a seed, for `made`.
NONE = {"loss": [1.640, 1.630, 1.635], "maxvio": [4.3, 4.5, 4.1]}
PHI = {"loss": [1.609, 1.600, 1.603], "maxvio": [0.85, 0.90, 0.80]}
LIKE_PHI = {"loss": [1.608, 1.602, 1.602], "maxvio": [0.25, 0.24, 0.26]}


def write_runs(
    folder: Path,
    *,
    methods: Iterable[str] = METHODS,
    seeds: Iterable[int] = (0, 1, 2),
    batchings: Iterable[str] = ("mixed", "one-domain"),
    steps: int = 60,
    **header: Any,
) -> Path:
    """A whole run for every method, seed and batching mode, each in a folder of its own."""
    for batching in batchings:
        for method in methods:
            for seed in seeds:
                path = folder / batching / f"{method.replace('/', '_')}-{seed}"
                write_run(path, method, seed=seed, batching=batching, steps=steps, header=header)
    return folder


def write_run(
    path: Path,
    method: str,
    *,
    seed: int = 0,
    batching: str = "mixed",
    steps: int = 60,
    stop: int | None = None,
    evaluate: bool = True,
    snapshots: bool = True,
    snapshot_every: int = 20,
    end: bool = True,
    experts: int = 32,
    layers: int = 2,
    header: Mapping[str, Any] | None = None,
    **evaluation: Any,
) -> Path:
    """One run; ``stop`` cuts it short, ``evaluation`` overrides numbers of the last evaluation."""
    dice = random.Random(f"{method}/{seed}/{batching}")
    shared = random.Random(f"{seed}/{batching}")
    loss, maxvio, dead, mi, time_s = METHODS.get(method, (1.62, 0.7, 0, 0.4, 0.1))
    loss += shared.gauss(0, 0.008) + dice.gauss(0, 0.003)
    maxvio *= 1 + dice.gauss(0, 0.05)
    log = RunLog(path)
    log.write("header", **_header(method, seed, batching, steps, experts, layers, header or {}))
    last = steps if stop is None else stop
    for step in range(1, last + 1):
        fade = 0.5 ** (6 * step / steps)
        row = {
            "loss": loss + 4 * fade + dice.gauss(0, 0.05),
            "lr": 1e-3,
            "step_time_s": time_s * (1 + 0.02 * dice.random()),
            "maxvio": max(0.05, maxvio * 1.2 + (3.0 - maxvio) * fade + dice.gauss(0, 0.1 * maxvio)),
            "soft_maxvio": maxvio / 3,
        }
        gini = min(0.05 + row["maxvio"] / 6, 0.9)
        log.write("step", step=step, gini=gini, **row)
        if snapshots and step % snapshot_every == 0:
            log.write("snapshot", step=step, load=_loads(dice, experts, layers, maxvio, dead))
    if evaluate:
        load = _loads(dice, experts, layers, maxvio, dead)
        numbers = {
            "loss": loss,
            "tokens": 98_304,
            "maxvio": maxvio,
            "maxvio_batch": maxvio + 0.4,
            "soft_maxvio": maxvio / 3,
            "soft_hard_gap": 0.02 + maxvio / 20,
            "gini": min(0.05 + maxvio / 6, 0.9),
            "entropy": 1 - maxvio / 20,
            "dead": dead / (experts * layers),
            "dead_experts": dead,
            "mi": mi if batching == "one-domain" else mi / 2,
            "purity": 0.25 + 0.6 * mi,
            "load": load,
            "soft": load,
        }
        specialised = mi if batching == "one-domain" else mi / 2
        numbers["domain_load"] = [_domain_loads(dice, layer, specialised) for layer in load]
        log.write("eval", step=last, **(numbers | evaluation))
    if end:
        log.write("end", status="complete" if stop is None else "interrupted", wall_s=last * time_s)
    log.close()
    return path


def planted(
    method_repr: str,
    load: np.ndarray,
    *,
    soft: np.ndarray | None = None,
    method: str = "phi",
    batching: str = "mixed",
    seed: int | None = 0,
    every: int = 1,
    tokens: int = 4096,
    top_k: int = 4,
    evals: Iterable[Mapping[str, Any]] = (),
    end: Mapping[str, Any] | None = None,
    **series: Any,
) -> Run:
    """A run with these shares of its experts at every step, (T, L, E) in even shares.

    What a batch counts is drawn from them. `series` are numbers of every step, `every` is how often
    a snapshot is kept, and `soft` defaults to the shares themselves.
    """
    dice = np.random.default_rng(seed)
    shares = load / load.sum(axis=-1, keepdims=True)
    seen = np.array([[dice.multinomial(tokens * top_k, f) for f in step] for step in shares])
    hard = seen / (tokens * top_k)
    quiet = shares if soft is None else soft / soft.sum(axis=-1, keepdims=True)
    steps, layers, experts = load.shape
    columns = {
        "loss": 2 + 3 * 0.97 ** np.arange(steps) + dice.normal(0, 0.03, steps),
        "maxvio": (experts * hard.max(axis=-1) - 1).mean(axis=-1),
        **series,
    }
    rows = [
        {"kind": "step", "step": i + 1, "tokens": float(tokens)}
        | {key: _plain(column[i]) for key, column in columns.items()}
        for i in range(steps)
    ]
    snapshots = [
        {"kind": "snapshot", "step": i + 1, "load": hard[i].tolist(), "soft": quiet[i].tolist()}
        for i in range(steps)
        if (i + 1) % every == 0 or i + 1 == steps
    ]
    header = {
        "kind": "header",
        "format": 1,
        "name": "planted",
        "method": method,
        "method_repr": method_repr,
        "parts": described(method_repr),
        "seed": seed,
        "batching": batching,
        "steps": steps,
        "model": {
            "num_experts": experts,
            "top_k": top_k,
            "layers": [f"l.{i}" for i in range(layers)],
        },
    }
    return Run(
        Path(f"{method}-{seed}/{LOG_NAME}"),
        header,
        tuple(rows),
        tuple(snapshots),
        tuple({"kind": "eval", "step": steps, **row} for row in evals),
        {"kind": "end", "status": "complete"} if end is None else end,
    )


def described(method_repr: str) -> list[dict[str, Any]]:
    """The parts of a method, as the header of a run of it has them."""
    return describe(eval(method_repr, {**vars(methods), **vars(potentials)}))


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def made(**values: dict[str, list[float | None]]) -> list[Run]:
    """Runs with these evaluation numbers: ``phi={"loss": [one a seed], "maxvio": […]}``."""
    runs = []
    for word, numbers in values.items():
        method = word.replace("_", "-")
        seeds = len(next(iter(numbers.values())))
        for seed in range(seeds):
            header = {"kind": "header", "format": 1, "method": method, "seed": seed, "steps": 5}
            row = {key: numbers[key][seed] for key in numbers}
            evals = ({"kind": "eval", "step": 5, **row},)
            runs.append(
                Run(Path(f"{method}-{seed}/{LOG_NAME}"), header | {"method_repr": ""}, evals=evals)
            )
    return runs


def sentence(runs: list[Run]) -> str:
    (section,) = summarise(runs)
    return section.verdict


def _header(
    method: str,
    seed: int,
    batching: str,
    steps: int,
    experts: int,
    layers: int,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    gates = [f"model.layers.{i}.mlp.gate" for i in range(layers)]
    known = method in METHODS and "method_repr" not in more
    return {
        **({"parts": describe(build_method(method))} if known else {}),
        "name": "synthetic",
        "method": method,
        "method_repr": REPRS.get(method, f"{method}(strength=0.01)"),
        "seed": seed,
        "batching": batching,
        "steps": steps,
        "recipe": {
            "optimizer": {"name": "AdamW", "lr": 1e-3, "warmup_steps": 20},
            "batch": {"sequences": 16, "length": 256},
            "seed": seed,
        },
        "versions": {"moebalance": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "commit": "0123abc",
        "data": {
            "sha256": "a" * 64,
            "domains": list(DOMAINS),
            "train_tokens": 1_240_000,
            "val_tokens": 98_304,
        },
        "model": {
            "architecture": "Qwen3MoeForCausalLM",
            "parameters": 463_104,
            "active_parameters": 201_216,
            "num_experts": experts,
            "top_k": 4,
            "layers": gates,
        },
        **more,
    }


def _loads(
    dice: random.Random, experts: int, layers: int, maxvio: float, dead: int
) -> list[list[float]]:
    loads = []
    for layer in range(layers):
        idle = dead // layers + (layer < dead % layers)
        weights = [0.0] * idle + [dice.lognormvariate(0, maxvio / 3) for _ in range(experts - idle)]
        dice.shuffle(weights)
        total = sum(weights)
        loads.append([weight / total for weight in weights])
    return loads


def _domain_loads(dice: random.Random, load: list[float], mi: float) -> list[list[float]]:
    home = [dice.randrange(len(DOMAINS)) for _ in load]
    return [
        [
            share * (1 + 4 * mi * (home[e] == d)) * dice.uniform(0.8, 1.2) / len(DOMAINS)
            for e, share in enumerate(load)
        ]
        for d in range(len(DOMAINS))
    ]
