"""A whole training step of a Transformers MoE model, with a method attached and without.

Variants are twins of one model that share its parameters, each attached once and for all; a step is
forward, backward and `Balancing.step()`.

A step takes half a second and varies by some percent, and balancing takes some thousandths of it.
So its parts are measured apart too: what it adds to the routers, and the end of the step.
"""

import copy
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moebalance.attachment import attach
from moebalance.lab.bench.scale import step_end
from moebalance.lab.bench.timing import BARE, NULL, interleaved, keep_freed_memory
from moebalance.lab.bench.variants import Attached, BareRouter, Outputs, Rule
from moebalance.methods import Method, orthogonality

PENALTY = "orthogonality of the routers' weights"


@dataclass(frozen=True)
class StepCase:
    """A Qwen3-MoE of this size, with random weights, on random tokens.

    Args:
        tokens: tokens in a step, in sequences of at most `length`.
        experts: E.
        top_k: K.
        layers: L.
        hidden: width of the model.
        length: tokens in a sequence.
        dtype: of the model.
    """

    tokens: int = 4096
    experts: int = 64
    top_k: int = 8
    layers: int = 4
    hidden: int = 128
    length: int = 256
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        """As in the tables."""
        return (
            f"{self.layers} layers of width {self.hidden}, T {self.tokens}, E {self.experts}, "
            f"K {self.top_k}, {str(self.dtype).removeprefix('torch.')}"
        )


def measure_steps(
    cases: Sequence[StepCase],
    methods: Mapping[str, Method],
    *,
    device: str = "cpu",
    rounds: int = 15,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time whole steps; rows as of `measure_routers`, without the counts.

    On a processor also `parts` by method, see there.
    """
    keep_freed_memory()
    rows = []
    for case in cases:
        tell(str(case))
        with torch.device(device):  # random numbers of a large model take minutes on a processor
            model = build(case)
        ids = torch.randint(0, 256, (case.tokens // case.length, case.length), device=device)
        named: dict[str, Method | None] = {BARE: None, NULL: None, **methods}
        calls = {name: _step(twin(model), ids, method) for name, method in named.items()}
        calls[PENALTY] = _penalised(twin(model), ids)
        timed = interleaved(calls, rounds=rounds, device=device)
        sizes = {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
        variants = {name: asdict(found) for name, found in timed.items()}
        row = {"case": str(case), **sizes, "variants": variants}
        if device == "cpu":
            row["parts"] = {name: parts(case, method, rounds) for name, method in methods.items()}
        rows.append(row)
    return rows


def parts(case: StepCase, method: Method, rounds: int) -> dict[str, float]:
    """What balancing takes of a step, each part measured alone on this processor.

    Returns:
        `added_ms` to all bare routers, forward and backward, and what a second bare router adds
        (`null_ms`); `end_ms`, of a step.
    """
    rule: Rule = "softmax, normalised"
    logits = torch.randn(case.tokens, case.experts).requires_grad_()
    upstream = torch.randn(case.tokens, case.top_k)
    bare, null = BareRouter(rule, case.top_k), BareRouter(rule, case.top_k)
    routers = bare, null, Attached(method, case.experts, case.top_k, rule)

    def seconds(router: Callable[[Tensor], Outputs]) -> float:
        start = time.perf_counter()
        torch.autograd.grad(router(logits)[0], logits, upstream)
        return time.perf_counter() - start

    taken = []
    for turn in range(2 * rounds + 2):
        order = random.Random(turn).sample(range(3), 3)
        by_place = {place: seconds(routers[place]) for place in order}
        taken.append([by_place[place] for place in range(3)])
    added_s = statistics.median(ours - plain for plain, _, ours in taken[2:])
    null_s = statistics.median(again - plain for plain, again, _ in taken[2:])
    return {
        "added_ms": round(1e3 * case.layers * added_s, 3),
        "null_ms": round(1e3 * case.layers * null_s, 3),
        "end_ms": step_end(method, case.layers, case.experts, rounds)["step_ms"],
    }


def build(case: StepCase) -> nn.Module:
    """The model of a case."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=256,
        hidden_size=case.hidden,
        intermediate_size=2 * case.hidden,
        moe_intermediate_size=case.hidden // 2,
        num_hidden_layers=case.layers,
        num_attention_heads=max(4, case.hidden // 128),
        num_key_value_heads=4,
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
        max_position_embeddings=case.length,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=case.dtype, trust_remote_code=False)  # type: ignore[no-untyped-call]
    model.set_experts_implementation("grouped_mm")
    found: nn.Module = model.train()
    return found


def twin(model: nn.Module) -> nn.Module:
    """A model with modules of its own, for hooks of its own, on the same parameters and buffers."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _penalised(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    weights = [weight for name, weight in model.named_parameters() if name.endswith("gate.weight")]

    def step() -> None:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        (loss + 0.01 * sum(map(orthogonality, weights))).backward()

    return step


def _step(model: nn.Module, ids: Tensor, method: Method | None) -> Callable[[], object]:
    balancing = None if method is None else attach(model, method)

    def step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if balancing is not None:
            balancing.step()

    return step
