"""DeepSpeed ZeRO: stages 1, 2 and 3 on two ranks train as one process does, without DeepSpeed."""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

import moebalance as mb
from families import tiny, tokens
from processes import run

FAMILY, SPEED, STEPS = "qwen3_moe", 0.1, 3
METHOD = mb.Together(mb.PhiBalancing(strength=0.5, peek=False), mb.LossFree(speed=0.02))
"""A term that does not depend on how a step is cut, and a price."""

WHEN = {
    "1": (1, "before"),
    "2": (2, "before"),
    "3": (3, "before"),
    "3, sharded": (3, "after"),
    "3, loaded": (3, "loaded"),
}
"""Stage, and whether `attach` is called before the engine shards the weights or after; or before,
of a model whose weights `from_pretrained` has sharded."""


class Trained(NamedTuple):
    """What one rank saw.

    Attributes:
        gradients: of the first router in each step.
        prices: of the first router after each step.
        tokens: that the last step counted.
        shape: of the router's weight when `attach` was called.
    """

    gradients: list[Tensor]
    prices: list[Tensor]
    tokens: float
    shape: tuple[int, ...]


def router_of(model: Any) -> Any:
    return next(m for name, m in model.named_modules() if name.endswith("layers.0.mlp.gate"))


def plainly(method: mb.Method) -> Trained:
    """One process and the whole batch."""
    model = tiny(FAMILY)
    balancing = mb.attach(model, method)
    weight, found = router_of(model).weight, Trained([], [], 0, ())
    optimizer = torch.optim.SGD(model.parameters(), lr=SPEED)
    for step in range(STEPS):
        ids = tokens(4, 12, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        found.gradients.append(weight.grad.clone())
        optimizer.step()
        optimizer.zero_grad()
        balancing.step()
        found.prices.append(next(iter(balancing.layers.values())).price.clone())
    return found._replace(tokens=balancing.metrics()["tokens"])


def loaded(config: dict[str, Any]) -> Any:
    """The model from its files, as a Trainer's script loads it under ZeRO-3: never whole."""
    from transformers.integrations import HfDeepSpeedConfig

    with tempfile.TemporaryDirectory() as own:
        tiny(FAMILY).save_pretrained(own)  # rank 0 alone writes
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        # Transformers looks for it as long as it lives.
        alive = HfDeepSpeedConfig(config)
        model = AutoModelForCausalLM.from_pretrained(folder[0], dtype=torch.float32)
        del alive
        dist.barrier()  # before the folder goes
    return model.train()


def under_zero(stage: int, when: str) -> Trained:
    """This rank's half of the batch, under DeepSpeed's engine."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # 1 by default
    }
    model = loaded(config) if when == "loaded" else tiny(FAMILY)
    if when != "after":
        balancing, shape = mb.attach(model, METHOD), tuple(router_of(model).weight.shape)
    parameters = list(model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameters,
        optimizer=torch.optim.SGD(parameters, lr=SPEED),
        config=config,
    )
    weight = router_of(model).weight
    if when == "after":
        shape = tuple(weight.shape)
        balancing = mb.attach(engine.module, METHOD)
    found = Trained([], [], 0, shape)
    for step in range(STEPS):
        ids = tokens(4, 12, seed=step).chunk(2)[dist.get_rank()]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        found.gradients.append(safe_get_full_grad(weight).clone())
        engine.step()
        balancing.step()
        found.prices.append(next(iter(balancing.layers.values())).price.clone())
    return found._replace(tokens=balancing.metrics()["tokens"])


def all_stages() -> dict[str, Trained]:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": str(dist.get_rank()),
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": "2",
    }
    warnings.simplefilter("ignore")  # DeepSpeed's own
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    return {name: under_zero(*how) for name, how in WHEN.items()}


@pytest.fixture(scope="module")
def one() -> Trained:
    return plainly(METHOD)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Trained]]:
    return run(all_stages, 2, limit_s=400)


@pytest.mark.situation(
    "Weights",
    "DeepSpeed ZeRO-1, 2 and 3, two ranks: the router's gradient with the term is one process's",
    "works",
)
@pytest.mark.parametrize("name", WHEN)
def test_the_routers_gradient_is_that_of_one_process(name, one, ranks):
    for step, expected in enumerate(one.gradients):
        for rank in ranks:
            torch.testing.assert_close(rank[name].gradients[step], expected, rtol=0, atol=1e-6)


def test_without_the_term_the_gradient_is_another(one):
    """Otherwise the test above would show nothing of the term."""
    without = plainly(METHOD.methods[1])
    assert (one.gradients[2] - without.gradients[2]).abs().max() > 1e-3


@pytest.mark.situation(
    "Weights",
    "DeepSpeed ZeRO-1, 2 and 3, two ranks: loss-free's price is equal on both, and one process's",
    "works",
)
@pytest.mark.parametrize("name", WHEN)
def test_the_price_is_equal_on_all_ranks_and_that_of_one_process(name, one, ranks):
    for step, expected in enumerate(one.prices):
        assert expected.any()
        for rank in ranks:
            torch.testing.assert_close(rank[name].prices[step], expected)
    assert {rank[name].tokens for rank in ranks} == {one.tokens} == {4 * 12}


@pytest.mark.situation(
    "Weights", "attach after ZeRO-3 has made the router's weight a tensor of shape (0,)", "works"
)
@pytest.mark.situation(
    "Weights",
    "`from_pretrained` under `HfDeepSpeedConfig` (ZeRO-3), two ranks",
    "works: gradient and price are one process's",
)
def test_a_partitioned_router_is_recognised(ranks):
    for name in ("3, sharded", "3, loaded"):
        assert {rank[name].shape for rank in ranks} == {(0,)}
    assert {rank["3"].shape for rank in ranks} != {(0,)}
