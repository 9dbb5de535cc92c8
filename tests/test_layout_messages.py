"""What ranks send each other, and how pipelines and Transformers models fare under it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import moebalance as mb
from cases import METHODS
from layout_models import EXPERTS, WIDTH, Stack, losses
from layouts import (
    SAME_GRADIENT,
    SAME_STATE,
)
from moebalance import Balancing, GlobalBatchLoss, LossFree, PhiBalancing
from processes import Collectives, run


class Pair(NamedTuple):
    """What one rank of two did."""

    interleaved: dict
    messages: dict
    transformers: dict


def pair() -> Pair:
    return Pair(interleave(), count_messages(), train_transformers(FRAMEWORKS))


@pytest.fixture(scope="module")
def two():
    return run(pair, 2)


# --- the one message --------------------------------------------------------------------------


COUNTED = {
    "phi": PhiBalancing(),
    "phi-hard": PhiBalancing(load="hard"),
    "loss-free": LossFree(),
    "global-batch": GlobalBatchLoss(),
    "quantile": mb.QuantileBalancing(bins=16),
    "phi-and-loss-free": mb.Together(PhiBalancing(), LossFree()),
}
OWN_NUMBERS = {
    "phi": EXPERTS,
    "phi-hard": EXPERTS,
    "loss-free": EXPERTS,
    "global-batch": 0,
    "quantile": EXPERTS + 16 * EXPERTS,
    "phi-and-loss-free": 2 * EXPERTS,
}
"""What the update reads in addition to the number of tokens."""


def count_messages() -> dict:
    """Collectives of five steps after the first, by method, layers and kind of metrics."""
    found = {}
    for name, method in COUNTED.items():
        for layers in (1, 3):
            for all_metrics in (True, False):
                model = Stack(method, layers=range(layers))
                handles = mb.attach(model).layers
                balancing = Balancing(method, handles, global_metrics=all_metrics)
                with Collectives() as collectives:
                    for step in range(6):
                        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
                        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
                        model(x).square().mean().backward()
                        if step % 2:
                            balancing.reduce()
                        balancing.step()
                        if step == 0:
                            collectives.seen.clear()
                with Collectives() as message:
                    balancing.reduce()
                balancing.discard()
                states = [dict(layer.state_dict()) for layer in balancing.layers.values()]
                found[name, layers, all_metrics] = collectives.seen, states, message.others
    return found


@pytest.mark.parametrize("method", COUNTED)
def test_a_step_sends_one_message_whatever_the_number_of_layers(method, two):
    for rank in two:
        for layers in (1, 3):
            extra = 16 * EXPERTS if method == "quantile" else 0
            full = 4 * (layers * (2 * EXPERTS + 1 + extra) + 6)
            lean = 4 * (layers * (OWN_NUMBERS[method] + 1) + 6)
            assert rank.messages[method, layers, True][0] == [("allreduce_", full)] * 5
            assert rank.messages[method, layers, False][0] == [("allreduce_", lean)] * 5


def test_the_message_is_cut_out_without_a_table_of_indices(two):
    """One made on the host has to be copied to the device for each layer, which waits for it."""
    for rank in two:
        for _, _, operations in rank.messages.values():
            assert "cat" in operations
            assert operations.isdisjoint({"arange", "sort", "index", "lift_fresh", "_to_copy"})


def test_a_message_without_metrics_makes_the_same_state(two):
    for rank in two:
        for (method, layers, _), (_, states, _) in rank.messages.items():
            _, others, _ = rank.messages[method, layers, True]
            for state, other in zip(states, others, strict=True):
                assert state.keys() == other.keys()
                assert all(torch.equal(state[key], other[key]) for key in state), method


# --- a Transformers model ---------------------------------------------------------------------

FRAMEWORKS = ("DDP", "FSDP2")
STRONG = {
    "phi": PhiBalancing(strength=1.0, rate=0.5, peek=False),
    "loss-free": LossFree(speed=0.02),
}


def train_transformers(frameworks: tuple[str, ...]) -> dict:
    """States and router gradients of a tiny Mixtral after some steps, by framework and method."""
    from families import loss, tiny, tokens

    found = {}
    for framework in frameworks:
        for name, method in STRONG.items():
            model = tiny("mixtral")
            balancing = mb.attach(model, method)
            wrapped = wrap_transformers(model, framework)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(4):
                ids = tokens(4, 12, seed=step)
                mine = ids if framework == "none" else ids.chunk(2)[dist.get_rank()]
                optimizer.zero_grad()
                loss(wrapped, mine).backward()
                optimizer.step()
                balancing.step()
            weights = {n: w for n, w in model.named_parameters() if n.endswith("mlp.gate.weight")}
            gradients = {n: whole(w.grad) for n, w in weights.items()}
            found[framework, name] = balancing.state_dict()["layers"], gradients
    return found


def wrap_transformers(model, framework: str):
    if framework == "DDP":
        return DistributedDataParallel(model)
    if framework == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    return model


def whole(gradient: Tensor) -> Tensor:
    """A gradient that may be sharded."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()


@pytest.fixture(scope="module")
def one_transformer():
    return train_transformers(("none",))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_transformers_model_on_two_ranks_learns_as_on_one(framework, one_transformer, two):
    for rank in two:
        for method in STRONG:
            layers, gradients = rank.transformers[framework, method]
            own_layers, own_gradients = one_transformer["none", method]
            assert layers.keys() == own_layers.keys()
            for name, state in layers.items():
                for key in state.keys() - {"last_step"}:
                    difference = (state[key] - own_layers[name][key]).abs().max()
                    assert difference <= SAME_STATE, (method, name, key)
            assert gradients.keys() == own_gradients.keys()
            assert gradients
            for name, gradient in gradients.items():
                own = own_gradients[name]
                assert (gradient - own).abs().max() <= SAME_GRADIENT * own.abs().max(), name


# --- stages that take turns -------------------------------------------------------------------

SCHEDULES = ("ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")


def interleave() -> dict:
    """Four stages on two ranks: tokens and router gradient of each, by schedule and stage."""
    from torch.distributed import pipelining

    groups = [dist.new_group([rank]) for rank in range(2)]
    found = {}
    for schedule in SCHEDULES:
        numbers = (dist.get_rank(), dist.get_rank() + 2)
        parts = {n: Stack(METHODS["phi-no-peek"], layers=[n]) for n in numbers}
        handles = {n: mb.attach(p, group=groups[dist.get_rank()]) for n, p in parts.items()}
        follow = handles[numbers[-1]].follow
        stages = [
            pipelining.PipelineStage(
                part,
                number,
                4,
                torch.device("cpu"),
                input_args=inputs()[:2].requires_grad_(number > 0),
                output_args=inputs()[:2].requires_grad_(),
            )
            for number, part in parts.items()
        ]
        run_step = getattr(pipelining, schedule)(
            stages, 4, loss_fn=lambda hidden, _, follow=follow: follow(losses(hidden).mean())
        ).step
        for _ in range(2):
            for part in parts.values():
                part.zero_grad()
            run_step(inputs()) if dist.get_rank() == 0 else run_step(target=inputs())
            for handle in handles.values():
                handle.step()
        for number, part in parts.items():
            gradient = part.layers[str(number)].gate.grad
            found[schedule, number] = handles[number].metrics()["tokens"], gradient
    return found


def inputs() -> Tensor:
    """Eight sequences of three tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_that_take_turns_and_split_backward_make_the_same_step(schedule, two):
    """Zero-bubble schedules take gradients of inputs first, and of weights later."""
    model = Stack(METHODS["phi-no-peek"], layers=range(4))
    balancing = mb.attach(model)
    for _ in range(2):
        model.zero_grad()
        balancing.follow(losses(model(inputs())).mean()).backward()
        balancing.step()
    found = two[0].interleaved | two[1].interleaved
    for number in range(4):
        tokens, gradient = found[schedule, number]
        own = model.layers[str(number)].gate.grad
        assert tokens == balancing.metrics()["tokens"] == 24
        assert (gradient - own).abs().max() <= SAME_GRADIENT * own.abs().max()
