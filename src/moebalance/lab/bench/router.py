"""One router, forward and backward: time, kernels, bytes and memory of every variant."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moebalance.lab.bench.timing import BARE, NULL, captured, interleaved, keep_freed_memory
from moebalance.lab.bench.traffic import kept_for_backward, traffic
from moebalance.lab.bench.variants import Attached, BareRouter, Ours, Outputs, Rule, others
from moebalance.methods import Method


@dataclass(frozen=True)
class Case:
    """The size of one comparison.

    Args:
        tokens: T.
        experts: E.
        top_k: K.
        rule: how affinities become weights.
        dtype: of the logits.
    """

    tokens: int
    experts: int
    top_k: int
    rule: Rule = "softmax"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """As in the tables: T 8192, E 64, K 8, softmax."""
        kind = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"T {self.tokens}, E {self.experts}, K {self.top_k}, {self.rule}{kind}"


def measure_routers(
    cases: Sequence[Case],
    methods: Mapping[str, Method],
    *,
    device: str = "cpu",
    rounds: int = 31,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure every variant in every case.

    Args:
        cases: sizes.
        methods: ours, by the name to show; each is timed as our router and attached to another's.
        device: "cpu" or a CUDA device.
        rounds: see `interleaved`.
        tell: called with each case before it starts.

    Returns:
        A row a case: its sizes and, by variant, `ratio` (median), `low` and `high` (quartiles),
        `time_ms`, `bytes` (moved more than by the bare router, per element of (T, E)), `kernels`
        (more than the bare router's, over tokens and in all), `kept` (bytes kept for backward,
        per element of (T, E)). On a CUDA device also `device`: the same as `ratio`, `low`, `high`
        and `time_ms`, of replays of a CUDA graph; None where there cannot be one.
    """
    keep_freed_memory()
    rows = []
    for case in cases:
        tell(str(case))
        rows.append(_measure(case, methods, device, rounds))
    return rows


def _measure(case: Case, methods: Mapping[str, Method], device: str, rounds: int) -> dict[str, Any]:
    logits = torch.randn(
        case.tokens,
        case.experts,
        generator=torch.Generator().manual_seed(0),
    ).to(device, case.dtype)
    # Not a leaf: nothing accumulates into it, and a term is no lighter for a gradient it can steal.
    logits.requires_grad_()
    upstream = torch.randn(case.tokens, case.top_k, device=device)
    variants = _variants(case, methods, device)

    def call(weigh: Callable[[Tensor], Outputs]) -> Callable[[], object]:
        def once() -> object:
            weights, term = weigh(logits)
            loss = torch.linalg.vecdot(weights.float(), upstream).sum()
            return torch.autograd.grad(loss if term is None else loss + term, logits)

        return once

    calls = {name: call(weigh) for name, weigh in variants.items()}
    timed = interleaved(calls, rounds=rounds, device=device)
    replayed = _replayed(calls, device, rounds)
    counted = {name: traffic(once, rows=case.tokens) for name, once in calls.items()}
    elements = case.tokens * case.experts
    found = {}
    for name in calls:
        more = counted[name].bytes - counted[BARE].bytes
        large = len(counted[name].large) - len(counted[BARE].large)
        small = len(counted[name].small) - len(counted[BARE].small)
        found[name] = {
            **asdict(timed[name]),
            "bytes": round(more / elements, 2),
            "kernels": [large, large + small],
            "kept": round(kept_for_backward(calls[name]) / elements, 2),
            **replayed.get(name, {}),
        }
    sizes = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    return {"case": str(case), **sizes, "variants": found}


def _replayed(
    calls: Mapping[str, Callable[[], object]], device: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Time on the device alone, where the device is one that can be told apart from its host."""
    if not device.startswith("cuda"):
        return {}
    graphs = {name: captured(once) for name, once in calls.items()}
    known = {name: graph for name, graph in graphs.items() if graph is not None}
    timed = interleaved(known, rounds=rounds, repeats=5, device=device)
    return {name: {"device": asdict(timed[name]) if name in timed else None} for name in calls}


def _variants(
    case: Case, methods: Mapping[str, Method], device: str
) -> dict[str, Callable[[Tensor], Outputs]]:
    bare = BareRouter(case.rule, case.top_k)
    found: dict[str, Callable[[Tensor], Outputs]] = {BARE: bare, NULL: bare}
    found["bare, choice in no order"] = BareRouter(case.rule, case.top_k, ordered=False)
    for name, method in methods.items():
        own = Ours(method, case.experts, case.top_k, case.rule)
        own.router.to(device)
        found[name] = own
        if device.startswith("cuda"):
            found[f"{name}, not fused"] = plain = Ours(
                method, case.experts, case.top_k, case.rule, fused=False
            )
            plain.router.to(device)
        if method.traits.charges or method.traits.selects:
            found[f"{name}, attached"] = attached = Attached(
                method, case.experts, case.top_k, case.rule
            )
            attached.layer.to(device)
        if method.traits.charges and not method.traits.selects:
            found[f"{name}, attached, in the router's own pass"] = own_pass = Attached(
                method, case.experts, case.top_k, case.rule, instead=False
            )
            own_pass.layer.to(device)
    return {**found, **others(case.experts, case.top_k, case.rule)}
