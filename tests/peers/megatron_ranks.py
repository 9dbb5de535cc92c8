"""The same step laid out over two ranks in Megatron's ways; what the ranks of a test run."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron_models import (
    EXPERTS,
    HIDDEN,
    MicroBatch,
    attach,
    balanced,
    layer_of,
    make_config,
    make_gpt,
    make_tower,
    normal,
    on_cpu,
    parallel,
    run_schedule,
    run_step,
    wrap,
)
from torch import Tensor, nn

from moebalance import LossFree, Method, PhiBalancing, Together
from moebalance.routing import Sums

LENGTH, SEQUENCES, MICRO_BATCHES, STEPS, VOCABULARY = 8, 4, 2, 3, 32
PHI = PhiBalancing(strength=0.1, rate=0.5, peek=False)
"""Its gradient does not depend on how a step is split."""
BOTH = Together(PHI, LossFree(speed=0.01))

Gradients = list[dict[str, Tensor]]


class Found(NamedTuple):
    """What training left: the routers' gradients of each step and the state at the end."""

    gradients: Gradients
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How a micro-batch (S, B, H) is split over two ranks.

    Args:
        sizes: of the parallel groups, named as the configuration names them.
        axis: of the split; None for all on one rank.
        settings: the rest of what the configuration must say.
        shares_loss: every rank's loss is that of all tokens, as with tensor parallelism.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    axis: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    shares_loss: bool = False

    def mine(self, whole: Tensor) -> Tensor:
        if self.axis is None:
            return whole.contiguous()
        return whole.chunk(2, dim=self.axis)[dist.get_rank()].contiguous()


ONE = Layout()
PAIRS = {
    "data": Layout({}, axis=1),
    "expert": Layout({"expert_model_parallel_size": 2}, axis=1),
    "context": Layout({"context_parallel_size": 2}, axis=0),
    "tensor": Layout(
        {"tensor_model_parallel_size": 2},
        axis=0,
        settings={"sequence_parallel": True},
        shares_loss=True,
    ),
}


def gradients(
    layout: Layout, method: Method | None = PHI, *, padded: bool = False, **changes: Any
) -> tuple[Gradients, dict[str, Tensor]]:
    """The routers' gradients in each step, by the term alone, and the state at the end."""
    with on_cpu(), parallel(**layout.sizes):
        settings = layout.settings | layout.sizes | changes
        if method is None:
            model = wrap(make_tower(make_config(**settings)))
        else:
            model, _ = balanced(method, **settings)
        found = [
            run_step(model, micro_batches(layout, step, padded=padded)) for step in range(STEPS)
        ]
        state = {n: v for n, v in model.module.state_dict().items() if "_extra_state" not in n}
        return found, {n: v for n, v in state.items() if "balance" in n or "expert_bias" in n}


def micro_batches(layout: Layout, step: int, *, padded: bool = False) -> list[MicroBatch]:
    """This rank's part of the same tokens on every layout; a third of them is padding or none."""
    whole = normal((LENGTH, SEQUENCES, HIDDEN), seed=step)
    real = torch.ones(LENGTH, SEQUENCES, dtype=torch.bool)
    if padded:
        real = normal((LENGTH, SEQUENCES), seed=50 + step) < 0.5
    found = []
    for half in range(MICRO_BATCHES):
        hidden, seen = (t.chunk(MICRO_BATCHES, dim=1)[half] for t in (whole, real))
        mine = layout.mine(seen)
        # Megatron's masks are (B, S) until its MoE layer turns them over.
        padding = ~mine.T.contiguous() if padded else None
        tokens = seen if layout.shares_loss else mine
        found.append(MicroBatch(layout.mine(hidden), padding, int(tokens.sum())))
    return found


def stock_bias(layout: Layout, **changes: Any) -> dict[str, Tensor]:
    """Megatron's own loss-free balancing."""
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    return gradients(layout, None, **settings, moe_router_bias_update_rate=0.01, **changes)[1]


def our_bias(layout: Layout, **changes: Any) -> dict[str, Tensor]:
    """Ours on its buffer."""
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    ours = LossFree(speed=0.01)
    return gradients(layout, ours, **settings, moe_router_bias_update_rate=0.0, **changes)[1]


AUX = {"moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "aux_loss"}
GLOBAL = {"moe_aux_loss_coeff": 0.1, "moe_router_load_balancing_type": "global_aux_loss"}
PER_TOKEN = {"calculate_per_token_loss": True}


def work() -> dict[Any, Any]:
    """All that the tests on two ranks look at: starting processes takes longer than running it."""
    # Megatron's own habits, on a torch newer than itself.
    warnings.filterwarnings("ignore", "Warning: tp_group is None", DeprecationWarning)
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    warnings.filterwarnings("ignore", "MLP requires ffn_hidden_size", DeprecationWarning)
    found: dict[Any, Any] = {
        "by hand": step_by_hand_beside_a_dense_stage(),
        "dense first": pipeline(2, [0, 1]),
        "experts everywhere": pipeline(2, [1, 1]),
    }
    for name, layout in PAIRS.items():
        found[name, "plain"] = gradients(layout)
        found[name, "per token"] = gradients(layout, padded=True, **PER_TOKEN)
        found[name, "bias"] = our_bias(layout)
        found[name, "stock bias"] = stock_bias(layout)
    for name in ("context", "tensor"):
        found[name, "padded"] = gradients(PAIRS[name], padded=True)
    found["stock global"] = gradients(PAIRS["data"], None, **GLOBAL)
    found["stock per token"] = gradients(PAIRS["context"], None, **AUX, **PER_TOKEN)
    return found


def pipeline(stages: int, moe_layers: list[int]) -> Found:
    """What a GPT cut into stages has on this rank after three steps of four micro-batches.

    Args:
        stages: how many, a rank each.
        moe_layers: 1 for a layer of experts, 0 for a dense one.
    """
    with on_cpu(), parallel(pipeline_model_parallel_size=stages):
        config = make_config(
            num_layers=len(moe_layers),
            moe_layer_freq=moe_layers,
            pipeline_model_parallel_size=stages,
            pipeline_dtype=torch.float32,
            batch_p2p_comm=True,
            deallocate_pipeline_outputs=False,
        )
        stage = make_gpt(config, BOTH, vocabulary=VOCABULARY, length=LENGTH)
        model = wrap(stage)
        balancing = attach(model)
        steps = [train_stage(model, step) for step in range(STEPS)]
        layers = [layer_of(stage, name)[0] for name in balancing.layers]
        state = {
            f"{number}.{name}": value
            for number, layer in zip(layers, balancing.layers.values(), strict=True)
            for name, value in layer.state_dict().items()
        }
        return Found(
            [{f"{layer_of(stage, n)[0]}": g for n, g in found.items()} for found in steps], state
        )


def train_stage(model: Any, step: int) -> dict[str, Tensor]:
    """One step of language modelling on this stage; the gradients of its routers."""
    generator = torch.Generator().manual_seed(step)
    batches = torch.randint(VOCABULARY, (4, SEQUENCES, LENGTH), generator=generator)
    left = iter(batches)
    positions = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)

    def forward_step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        ids = next(left)
        return chunk(ids, positions, None, labels=ids), lambda loss: (loss.mean(), {})

    return run_schedule(model, forward_step, micro_batches=4, shape=(LENGTH, SEQUENCES))


def step_by_hand_beside_a_dense_stage() -> int:
    """Steps that a rank ended itself, on a pipeline whose first stage has no experts."""
    with on_cpu(), parallel(pipeline_model_parallel_size=2):
        config = make_config(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
        stage = make_tower(config, PHI) if dist.get_rank() == 1 else nn.Linear(2, 2)
        stage.config = config
        balancing = attach(stage, step_by_hand=True)
        for layer in balancing.layers.values():
            layer.count(Sums(*torch.ones(2, EXPERTS), torch.ones(())))
        balancing.step()
        return len(balancing.layers)
