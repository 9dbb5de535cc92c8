"""torchtitan: its own router and rule against ours, the term's strength, and what is counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torchtitan_models import (
    BATCH,
    DIM,
    EXPERTS,
    LAST,
    LENGTH,
    TOP_K,
    ParallelDims,
    activation_checkpoint,
    adam,
    gate_gradients,
    one_process,
    quiet,
    state,
    tiny_config,
    train,
    trainer,
    whole,
)

from cases import METHODS, commit
from moebalance import (
    BalancedRouter,
    Balancing,
    LossFree,
    Method,
    NoBalancing,
    PhiBalancing,
    Sigmoid,
    Together,
)
from moebalance.integrations.torchtitan import balanced, drive
from moebalance.methods import charge
from moebalance.routing import route

PHI = PhiBalancing(strength=1.0, rate=0.5, peek=False, unit="paper")
STOCK = LossFree(speed=1e-3, recentre=True)


@pytest.fixture(autouse=True, scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_process(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def make_moe(method: Method | None, *, score: str = "sigmoid", **router: Any) -> Any:
    """A layer of torchtitan's own, balanced or stock, with the same weights every time."""
    config = tiny_config(layers=2)
    layer = config.model_spec.model.layers[1].moe
    layer.router = dataclasses.replace(layer.router, score_func=score, **router)
    if method is not None:
        balanced(config, method)
    with torch.device("meta"):
        moe = layer.build()
    moe.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        moe.init_states()
        # Far from even: the first experts get nearly all tokens.
        slope = torch.linspace(3, 0.1, EXPERTS).unsqueeze(1)
        moe.router.gate.weight.copy_(torch.randn(EXPERTS, DIM) * slope)
    return moe.train()


def drive_one(moe: Any, method: Method) -> tuple[Any, Balancing]:
    """The optimizers of a model of one layer, and its handle."""
    optimizers = adam(1e-2).build(model_parts=[moe])
    balancing = drive(optimizers, [moe], ParallelDims(1, 1, 1, 1, 1, 1, 1), method=method)
    assert balancing is not None
    return optimizers, balancing


def batch(number: int) -> Tensor:
    return torch.randn(BATCH, LENGTH, DIM, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("groups", [None, 4], ids=["all", "groups"])
def test_routes_to_the_bit_as_the_stock_router_does(
    score: str, norm: bool, groups: int | None
) -> None:
    options = {
        "route_norm": norm,
        "num_expert_groups": groups,
        "num_limited_groups": groups and 2,
        "route_scale": 2.5,
    }
    price = torch.randn(EXPERTS) / 4
    stock = make_moe(None, score=score, **options)
    ours = make_moe(STOCK, score=score, **options)
    ours.router.balance.adopt(price)
    found: list[Tensor] = []
    expected: list[Tensor] = []
    for router, answers in ((ours.router, found), (stock.router, expected)):
        answers.extend(router(batch(0), -price))
        answers[0].square().sum().backward()
        answers.append(router.gate.weight.grad)
        answers.extend(router.eval()(batch(1), -price))
    assert len(found) == 7
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_bias_that_no_method_moves_still_chooses() -> None:
    bias = torch.randn(EXPERTS) / 4
    stock, ours = make_moe(None).router, make_moe(PHI).router
    assert torch.equal(ours(batch(0), bias)[1], stock(batch(0), bias)[1])
    assert not torch.equal(ours(batch(0), bias)[1], ours(batch(0), None)[1])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_steps_as_in_a_router_of_our_own(name: str) -> None:
    method = METHODS[name]
    moe = make_moe(method, score="softmax", route_norm=False)
    _, balancing = drive_one(moe, method)
    own = BalancedRouter(method, EXPERTS, TOP_K, normalize=False)
    gate = moe.router.gate
    for number in range(2):
        moe.router(batch(number), moe.expert_bias_E)[0].square().sum().backward()
        gradient, gate.weight.grad = gate.weight.grad, None
        own(gate(batch(number)))[0].square().sum().backward()
        if number == 1:  # the first step only counts
            torch.testing.assert_close(gradient, gate.weight.grad, rtol=1e-4, atol=1e-6)
        gate.weight.grad = None
        balancing.step()
        commit(own)
    for mine, theirs in zip(moe.router.balance.buffers(), own.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_recentred_loss_free_trains_as_the_stock_sign_rule(accumulation: int) -> None:
    def trained(method: Method | None) -> dict[str, Tensor]:
        config = tiny_config(steps=8)
        config.training.global_batch_size = BATCH * accumulation
        return state(train(config if method is None else balanced(config, method)))

    stock, ours = trained(None), trained(STOCK)
    assert stock["layers.2.moe.expert_bias_E"].abs().max() > 4e-3
    assert {key for key in ours if ".balance." not in key} == set(stock)
    for key, theirs in stock.items():
        if "expert_bias" in key:
            torch.testing.assert_close(ours[key], theirs, rtol=0, atol=1e-7)
        else:
            assert torch.equal(ours[key], theirs), key


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_term_is_strength_times_the_mean_over_all_tokens_of_a_step(accumulation: int) -> None:
    def make(method: Method) -> Any:
        config = balanced(tiny_config(), method)
        config.training.global_batch_size = BATCH * accumulation
        return config

    charged, plain = gate_gradients(make(PHI)), gate_gradients(make(NoBalancing()))
    assert torch.equal(charged[0], plain[0])

    # By autograd, from the inputs that the router saw in the second step.
    seen: list[Tensor] = []
    with trainer(make(PHI)) as built:
        layer = built.model_parts[0].get_submodule(LAST)
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        built.optimizers.register_step_pre_hook(
            lambda *_: states.append(
                (layer.balance.state.mean.clone(), whole(layer.gate.weight).clone())
            )
        )
        states: list[tuple[Tensor, Tensor]] = []
        built.train()
    mean, weight = states[1]
    inputs = torch.cat(seen[accumulation:]).flatten(0, 1)
    assert len(seen) == 2 * accumulation
    weight.requires_grad_()
    logits = inputs @ weight.T
    routing = route(logits, logits.topk(TOP_K).indices, Sigmoid())
    # The average is its one step's, 0.5 · p̄ with weight 0.5.
    price = PHI.strength * PHI.potential.grad(mean / 0.5)
    (expected,) = torch.autograd.grad(charge(price, routing), weight)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(charged[1] - plain[1], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recompute_is_not_counted_twice(kind: str) -> None:
    """torchtitan #1593: the stock counters see every recomputed token twice."""
    policies = {
        "full": activation_checkpoint.FullAC,
        "selective": activation_checkpoint.SelectiveAC,
    }

    def trained(policy: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
        config = balanced(tiny_config(steps=3), Together(PHI, STOCK))
        config.activation_checkpoint = policy
        gradients = gate_gradients(config)
        return state(train(config)), gradients

    once, plain = trained(policies[kind].Config()), trained(None)
    assert once[0][f"{LAST}.balance.last_step"][0] == BATCH * LENGTH
    for key, tensor in plain[0].items():
        torch.testing.assert_close(once[0][key], tensor)
    torch.testing.assert_close(once[1], plain[1])


def test_the_stock_counters_do_count_recompute_twice() -> None:
    """What the test above is held against: if this fails, torchtitan has changed."""
    config = tiny_config(steps=1)
    config.model_spec.post_optimizer_build_fn = None
    config.activation_checkpoint = activation_checkpoint.FullAC.Config()
    named = train(config).model_parts[0].named_modules()
    (layer,) = [module for name, module in named if name.endswith("moe") and "layers.2" in name]
    assert layer.tokens_per_expert_E.sum() == 2 * BATCH * LENGTH * TOP_K


def test_eval_and_forwards_on_the_side_are_not_counted() -> None:
    """torchtitan #4412: the stock counters see whatever passes a model in training mode."""
    stock, ours = make_moe(None), make_moe(STOCK)
    for moe in (stock, ours):
        with torch.no_grad():
            moe(batch(0))
            moe.eval()(batch(1))
    assert stock.tokens_per_expert_E.sum() == BATCH * LENGTH * TOP_K
    assert not ours.router.balance.running.any()
    ours.train()(batch(2)).sum().backward()
    assert ours.router.balance.running[2 * EXPERTS] == BATCH * LENGTH


def test_evaluation_is_seen_by_those_who_watch() -> None:
    moe = make_moe(STOCK)
    _, balancing = drive_one(moe, STOCK)
    balancing.watch()
    with torch.no_grad():
        moe.eval()(batch(0))
    metrics, _ = balancing.evaluation()
    assert metrics["tokens"] == BATCH * LENGTH
    assert not moe.router.balance.running.any()


def test_a_backward_split_in_two_counts_once() -> None:
    """Zero-bubble schedules go back for the inputs first and for the weights later."""
    moe, whole_at_once = make_moe(PHI).router, make_moe(PHI).router
    for router in (moe, whole_at_once):
        router.balance.last_step.copy_(torch.tensor([BATCH * LENGTH, 1.0]))
    inputs = batch(0).requires_grad_()
    weights = moe(inputs)[0].square()
    _, groups = stage_backward_input([weights.sum()], None, [inputs], iter(moe.parameters()))
    stage_backward_weight(iter(moe.parameters()), groups)
    whole_at_once(batch(0))[0].square().sum().backward()
    assert moe.balance.running[2 * EXPERTS] == BATCH * LENGTH
    torch.testing.assert_close(moe.gate.weight.grad, whole_at_once.gate.weight.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("recomputed", [False, True], ids=["plain", "selective"])
def test_compiled_as_torchtitan_compiles_it_trains_the_same(recomputed: bool) -> None:
    def trained(*, compiled: bool) -> dict[str, Tensor]:
        config = balanced(tiny_config(layers=2), Together(PHI, STOCK))
        config.compile.enable = compiled
        config.compile.components = ["model"]
        config.compile.backend = "aot_eager"
        if recomputed:
            config.activation_checkpoint = activation_checkpoint.SelectiveAC.Config()
        return state(train(config))

    eager, compiled = trained(compiled=False), trained(compiled=True)
    torch._dynamo.reset()
    assert compiled["layers.1.moe.router.balance.last_step"][0] == BATCH * LENGTH
    for key, tensor in eager.items():
        torch.testing.assert_close(compiled[key], tensor)


def test_in_bfloat16_state_and_price_stay_float32() -> None:
    """`.to(bf16)` casts torchtitan's own bias and counters, and small steps are lost in them."""
    moe = make_moe(LossFree(speed=1e-5)).to(torch.bfloat16)
    _, balancing = drive_one(moe, LossFree(speed=1e-5))
    start = torch.linspace(0.5, 0.9, EXPERTS)
    moe.router.balance.adopt(start)
    for number in range(3):
        moe(batch(number).bfloat16()).sum().backward()
        balancing.step()
    balance = moe.router.balance
    assert {b.dtype for b in balance.buffers()} == {balance.running.dtype} == {torch.float32}
    moved = balance.price - start
    assert moved.abs().max() > 2.5e-5
    assert moe.expert_bias_E.dtype == torch.bfloat16
    # Loading its own rounded bias back must not round the price.
    moe.load_state_dict(moe.state_dict())
    torch.testing.assert_close(balance.price - start, moved, rtol=0, atol=0)


def test_a_layer_without_bias_does_not_keep_the_others_from_balancing() -> None:
    """torchtitan #3686: the stock hook refuses, or passes over, models with mixed layers."""

    def mixed(method: Method | None) -> Any:
        config = tiny_config()
        config.model_spec.model.layers[1].moe.load_balance_coeff = None
        return config if method is None else balanced(config, method)

    with pytest.raises(ValueError, match="configured consistently"):
        train(mixed(None))
    for method in (PHI, STOCK):
        built = train(mixed(method))
        assert built.optimizers.balancing.steps == 2
        assert built.optimizers.balancing.metrics()["tokens"] == BATCH * LENGTH
    assert state(built)["layers.1.moe.expert_bias_E"].any()
