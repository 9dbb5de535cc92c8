"""The layout law: how a step's tokens are split among micro-batches and ranks changes no state.

Nor does it change what a method adds to the router's gradient, unless the method says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import moebalance as mb
from cases import METHODS, POTENTIALS, parts
from layout_cases import (
    ALONE,
    DENSE_ALONE,
    DENSE_PAIRS,
    NAMED_ALONE,
    NAMED_PAIRS,
    ONE,
    PAIRS,
    QUADS,
    RAGGED_ALONE,
    RAGGED_PAIRS,
    Layout,
    halves,
)
from layout_models import EXPERTS, WIDTH, Stack, losses
from layouts import (
    ROWS,
    SAME_GRADIENT,
    SAME_STATE,
    Difference,
    additive,
    difference,
    train_all,
)
from moebalance.core.handle import Balancing
from moebalance.methods import GlobalBatchLoss, LossFree, PhiBalancing, Sinkhorn, Together
from processes import Collectives, run

ADDITIVE = [name for name, method in METHODS.items() if additive(method)]
COUPLED = {
    unit: [name for name, method in METHODS.items() if method.traits.coupling == unit]
    for unit in ("sequence", "batch", "step")
}
"""What must not be taken apart, and for whom."""
FEW = (
    "phi-negative-entropy",
    "phi-no-peek",
    "phi-hard",
    *COUPLED["sequence"],
    "ema-switch",
    "loss-free",
    "quantile",
    "z-loss",
    "phi-and-loss-free",
)
"""One of each kind, where time is short."""

UNSHARED = {"not summed": Layout(halves(0), wrap=DistributedDataParallel, alone=True)}
MOVED = ("phi-no-peek", "loss-free-fast", "quantile")
"""A mistake: ranks with different tokens that do not tell each other; and whom it moves most."""


class Pair(NamedTuple):
    """What one rank of two did."""

    trained: dict
    interleaved: dict
    messages: dict
    transformers: dict


def pair() -> Pair:
    trained = train_all(PAIRS, METHODS) | train_all(RAGGED_PAIRS, FEW)
    trained |= train_all(UNSHARED, MOVED)
    return Pair(trained, interleave(), count_messages(), train_transformers(FRAMEWORKS))


@pytest.fixture(scope="module")
def one():
    return train_all({"all": ONE["all"]}, METHODS) | train_all(ONE, FEW)


@pytest.fixture(scope="module")
def two():
    return run(pair, 2, limit_s=240)


def compare(sides, one, name: str, layout: Layout, method: str) -> Difference:
    reference = one[layout.tokens, method]
    return difference([side[name, method] for side in sides], reference, METHODS[method])


def test_the_page_has_a_row_for_every_method():
    """`python tests/layouts.py` prints them; of the potentials, which are alike here, one."""
    page = (Path(__file__).parents[1] / "docs" / "layout.md").read_text(encoding="utf-8")
    table = page[page.index("| method | coupling |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["method", "coupling", *ALONE, *PAIRS, *QUADS, "state"]
    couplings = {row[0]: row[1] for row in cells[2:]}
    assert couplings == {name: METHODS[name].traits.coupling for name in ROWS}
    assert len({*METHODS} - {*ROWS}) < len(POTENTIALS)
    for method, coupling, *found, state in cells[2:]:
        assert float(state) <= SAME_STATE, method
        assert coupling != "token" or set(found) == {"="}, method


# --- the law ----------------------------------------------------------------------------------


def check(sides, one, name: str, layout: Layout, methods: Iterable[str]) -> None:
    """Hold every method's outcome under a layout against that of one process."""
    for method in methods:
        found = compare(sides, one, name, layout, method)
        said = f"{method} under {name}: {found}"
        assert found.state <= SAME_STATE, said
        if not any(isinstance(part, Sinkhorn) for part in parts(METHODS[method])):
            assert found.sums <= SAME_STATE, said
        if method in ADDITIVE:
            assert found.gradient <= SAME_GRADIENT, said
            assert found.effective <= SAME_GRADIENT, said


@pytest.mark.parametrize("name", [*ALONE, *RAGGED_ALONE])
def test_micro_batches_make_the_step_that_one_batch_makes(name, one):
    layout, methods = {**ALONE, **RAGGED_ALONE}[name], METHODS if name in ALONE else FEW
    check([train_all({name: layout}, methods)], one, name, layout, methods)


@pytest.mark.parametrize("name", [*PAIRS, *RAGGED_PAIRS])
def test_two_ranks_make_the_step_that_one_process_makes(name, one, two):
    methods = METHODS if name in PAIRS else FEW
    check([rank.trained for rank in two], one, name, {**PAIRS, **RAGGED_PAIRS}[name], methods)


def test_four_ranks_make_the_step_that_one_process_makes(one):
    sides = run(train_all, 4, QUADS, FEW)
    for name, layout in QUADS.items():
        check(sides, one, name, layout, FEW)


NAMED = ("phi-negative-entropy", "phi-hard", "sequence", "loss-free", "z-loss", "phi-and-loss-free")


@pytest.mark.parametrize("name", NAMED_ALONE)
def test_named_linear_gates_make_the_step_of_balanced_routers(name, one):
    layout = NAMED_ALONE[name]
    check([renamed(train_all({name: layout}, NAMED))], one, name, layout, NAMED)


@pytest.fixture(scope="module")
def named():
    return run(train_all, 2, NAMED_PAIRS | DENSE_PAIRS, NAMED)


@pytest.mark.parametrize("name", NAMED_PAIRS)
def test_named_linear_gates_on_two_ranks_make_the_step_of_one_process(name, one, named):
    check([renamed(side) for side in named], one, name, NAMED_PAIRS[name], NAMED)


@pytest.mark.parametrize("name", DENSE_PAIRS)
def test_a_pipeline_with_a_dense_first_stage_makes_the_step_of_one_process(name, named):
    alone = train_all({"all": DENSE_ALONE["dense first"]}, NAMED)
    check(named, alone, name, DENSE_PAIRS[name], NAMED)
    assert all(not named[0][name, method] and named[1][name, method] for method in NAMED)


def renamed(side: dict) -> dict:
    """Layers by the name that they have where the gate is a router of ours."""
    return {
        key: {name.replace(".gate", ".router"): seen for name, seen in layers.items()}
        for key, layers in side.items()
    }


def test_ranks_that_do_not_share_what_they_counted_are_found_out(one, two):
    """Otherwise the tests above could not fail."""
    ((name, layout),) = UNSHARED.items()
    for method in MOVED:
        found = compare([rank.trained for rank in two], one, name, layout, method)
        assert found.state > 1e-4, method
        assert found.sums > 0.1, method
        assert found.gradient > 1e-4, method


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
    """Zero-bubble schedules run the backward of inputs and that of weights at different times."""
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


# --- who cannot obey --------------------------------------------------------------------------


@pytest.mark.parametrize("method", COUPLED["batch"] + COUPLED["step"])
def test_a_method_that_says_its_gradient_depends_on_the_layout_tells_the_truth(method, one, two):
    sides = [rank.trained for rank in two]
    found = {n: compare(sides, one, n, layout, method).effective for n, layout in PAIRS.items()}
    # Under tensor parallelism every rank has all tokens in one batch: nothing is split.
    assert found.pop("TP 2") <= SAME_GRADIENT
    assert min(found.values()) > 1e-3, found


@pytest.mark.parametrize("method", [name for names in COUPLED.values() for name in names])
def test_a_batch_of_another_rank_weighs_as_one_of_another_micro_batch(method, two):
    """But not to a method that looks back at the earlier micro-batches of its own process."""
    apart = train_all({"DDP 2": ALONE["accumulation 2"]}, [method])
    sides = [rank.trained["DDP 2", method] for rank in two]
    found = difference(sides, apart["DDP 2", method], METHODS[method])
    if method in COUPLED["step"]:
        assert found.gradient > 1e-3
    else:
        assert found.gradient <= SAME_GRADIENT


@pytest.mark.parametrize("name", COUPLED["sequence"])
def test_a_loss_of_whole_sequences_depends_on_where_sequences_are_cut_and_on_their_lengths(
    name, one, two
):
    sides = [rank.trained for rank in two]
    for layout_name, layout in PAIRS.items():
        found = compare(sides, one, layout_name, layout, name).effective
        assert found > 0.1 if layout.cuts_sequences else found <= SAME_GRADIENT, layout_name
    padded = "DDP 2, padding"
    assert compare(sides, one, padded, RAGGED_PAIRS[padded], name).effective > 0.01


def test_two_methods_together_couple_as_much_as_the_one_that_couples_more():
    by_unit = {"token": LossFree(), **{unit: METHODS[COUPLED[unit][0]] for unit in COUPLED}}
    for number, (unit, method) in enumerate(by_unit.items()):
        for other, free in list(by_unit.items())[: number + 1]:
            if not (method.traits.selects and free.traits.selects):
                assert Together(method, free).traits.coupling == unit, other
                assert Together(free, method).traits.coupling == unit, other


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
"""What the update reads, besides the number of tokens."""


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
