"""torchtitan on two processes: one term, whatever the parallelism; and pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan_models import (
    LENGTH,
    ParallelDims,
    adam,
    gate_gradients,
    one_process,
    quiet,
    tiny_config,
    tokens,
    trainer,
)

from moebalance import LossFree, Method, NoBalancing, PhiBalancing, Together
from moebalance.integrations.torchtitan import balanced
from moebalance.integrations.torchtitan.steps import disjoint_tokens
from processes import run

PHI = PhiBalancing(strength=1.0, rate=0.5, peek=False)

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "fsdp-as-dtensors": {"spmd_backend": "full_dtensor"},
    "replicated": {"data_parallel_replicate_degree": 2},
    "experts": {"expert_parallel_degree": 2},
    "tensors": {"tensor_parallel_degree": 2},
    "tensors-as-dtensors": {"tensor_parallel_degree": 2, "spmd_backend": "full_dtensor"},
    "tensors-and-experts": {"tensor_parallel_degree": 2, "expert_parallel_degree": 2},
}


def laid_out(seed: Path, layout: dict[str, Any], method: Method) -> Any:
    """Two steps of two batches each, from the weights in `seed`."""
    config = balanced(tiny_config(lr=1e-6), method)
    config.training.global_batch_size = 4
    config.checkpoint.enable = True
    config.checkpoint.load_only = True
    config.checkpoint.initial_load_path = str(seed)
    config.parallelism.spmd_backend = "partial_dtensor"
    for key, value in layout.items():
        setattr(config.parallelism, key, value)
    return config


def term(seed: Path, layout: dict[str, Any]) -> Tensor:
    """What the method adds to the gate's gradient in the second step."""
    charged = gate_gradients(laid_out(seed, layout, PHI))
    plain = gate_gradients(laid_out(seed, layout, NoBalancing()))
    # The first step only counts, so both come to the second with the same weights.
    torch.testing.assert_close(charged[0], plain[0], rtol=0, atol=0)
    return charged[1] - plain[1]


def make_seed(folder: Path) -> Path:
    """torchtitan's own unsharded checkpoint of the first weights."""
    config = balanced(tiny_config(folder), PHI)
    config.checkpoint.create_seed_checkpoint = True
    with trainer(config) as built:
        built.checkpointer.save(curr_step=0, last_step=True)
    return folder / "checkpoint" / "step-0"


def group_sizes() -> dict[str, int]:
    """Ranks that the sums of a step go to, by what the two are there for."""
    found = {}
    for axes in ("dp_shard", "cp", "tp", "pp", "tp ep"):
        degrees = dict.fromkeys(("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep"), 1)
        degrees.update(dict.fromkeys(axes.split(), 2))
        dims = ParallelDims(**degrees, world_size=2)
        found[axes] = dist.get_world_size(disjoint_tokens(dims))
    return found


def on_two(seed: Path) -> tuple[dict[str, Tensor], tuple[int, list[float]], dict[str, int]]:
    """All that needs two processes, in one start of them."""
    terms = {name: term(seed, layout) for name, layout in LAYOUTS.items()}
    return terms, train_a_stage(), group_sizes()


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("seed")
    with one_process(folder):
        yield make_seed(folder)


@pytest.fixture(scope="module")
def ranks(seed: Path) -> list[Any]:
    return run(on_two, 2, seed)


@pytest.fixture(scope="module")
def accumulated(seed: Path) -> Tensor:
    return term(seed, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_term_is_the_same_on_two_ranks_as_in_two_micro_batches(
    ranks: list[Any], accumulated: Tensor, layout: str
) -> None:
    assert accumulated.norm() > 1e-3
    for terms, _, _ in ranks:
        torch.testing.assert_close(terms[layout], accumulated, rtol=1e-3, atol=1e-6)


def train_a_stage() -> tuple[int, list[float]]:
    """Two steps of a stage of torchtitan's; the first has no MoE layer. Layers, tokens a step."""
    rank = dist.get_rank()
    dims = ParallelDims(1, 1, 1, 1, 2, 1, 2, spmd_backend="partial_dtensor")
    config = balanced(tiny_config(), Together(PHI, LossFree()))
    config.training.local_batch_size = 4
    config.parallelism.pipeline_parallel_degree = 2
    config.parallelism.module_fqns_per_model_part = [
        ["tok_embeddings", "layers.0"],
        ["layers.1", "layers.2", "norm", "lm_head"],
    ]
    torch.manual_seed(0)
    schedule, parts, *_ = config.model_spec.pipelining_fn(
        config.model_spec.model.build(),
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder="",
        device=torch.device("cpu"),
        model_config=config.model_spec.model,
        parallelize_fn=lambda part, **_: part,
        loss_fn=config.loss.build(),
    )
    for part in parts:
        part.init_weights()
    optimizers = adam(1e-2).build(model_parts=parts)
    config.model_spec.post_optimizer_build_fn(optimizers, parts, dims)

    words = torch.cat([tokens(0), tokens(1)])
    inputs, targets = words[:, :-1], words[:, 1:]
    with quiet():
        counted = []
        for _ in range(2):
            optimizers.zero_grad()
            schedule.step(*([inputs] if rank == 0 else []), target=targets if rank else None)
            optimizers.step()
            if hasattr(optimizers, "balancing"):
                counted.append(optimizers.balancing.metrics()["tokens"])
    layers = len(optimizers.balancing.layers) if counted else 0
    return layers, counted


def test_a_pipeline_stage_without_moe_layers_neither_crashes_nor_hangs(ranks: list[Any]) -> None:
    """torchtitan #1689."""
    (_, first, _), (_, second, _) = ranks
    assert first == (0, [])
    assert second[0] == 2
    assert second[1][-1] == 4 * LENGTH


def test_what_torch_tries_to_learn_a_stages_shapes_is_not_counted(ranks: list[Any]) -> None:
    """torchtitan builds its stages without examples of what goes in and comes out."""
    (_, (_, counted), _) = ranks[1]
    assert counted == [4 * LENGTH] * 2


def test_sums_go_to_the_ranks_with_other_tokens_of_the_same_layers(ranks: list[Any]) -> None:
    for _, _, sizes in ranks:
        assert sizes == {"dp_shard": 2, "cp": 2, "tp": 1, "pp": 1, "tp ep": 2}
