"""OLMo-core: its losses and its bias rule against ours, what ends a step, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from olmo_models import (
    EXPERTS,
    LENGTH,
    SEQUENCES,
    TOP_K,
    WIDTH,
    MoELinearRouter,
    Tower,
    batch,
    gradients,
    olmo_core,
)
from torch import Tensor, nn

import moebalance as mb
from documents import blocks
from moebalance.methods.forced import Forced

STRENGTH = 0.1
PAGE = Path(__file__).parents[2] / "docs" / "other_stacks.md"
attach = olmo_core.attach


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
@pytest.mark.parametrize("per_sequence", [False, True], ids=["batch", "instance"])
@pytest.mark.parametrize("divided", [False, True], ids=["mean", "divided"])
def test_our_losses_are_olmo_cores(gating: str, per_sequence: bool, divided: bool) -> None:
    stock = Tower(lb_loss_weight=STRENGTH, per_sequence=per_sequence, gating_function=gating)
    ours = Tower(gating_function=gating)
    attach(ours, (mb.SequenceLoss if per_sequence else mb.SwitchLoss)(STRENGTH))
    # A quarter of a step of four batches.
    divisor = 4.0 * SEQUENCES * LENGTH if divided else None
    expected = gradients(stock, [batch()], divisor)
    assert_equal(gradients(ours, [batch()], divisor), expected)


def test_loss_free_is_olmo_cores_bias_to_the_bit() -> None:
    stock, ours = Tower(bias_gamma=0.01), Tower(bias_gamma=0.01)
    balancing = attach(ours, mb.LossFree(speed=0.01))
    for step in range(5):
        for model in (stock, ours):
            gradients(model, [batch(2 * step), batch(2 * step + 1)])
            model.post_batch()
        for theirs, mine in zip(stock.routers, ours.routers, strict=True):
            assert torch.equal(mine.score_bias, theirs.score_bias)
    assert balancing.steps == 5
    assert max(router.score_bias.abs().max() for router in ours.routers) > 0.02
    for found, expected in zip(ours.eval()(batch(9)), stock.eval()(batch(9)), strict=True):
        assert torch.equal(found, expected)


def test_a_price_without_a_bias_ranks_as_one_with_it() -> None:
    native, ranked = Tower(bias_gamma=0.01), Tower()
    for model in (native, ranked):
        attach(model, mb.LossFree(speed=0.05))
    for step in range(4):
        for model in (native, ranked):
            gradients(model, [batch(step)])
            model.post_batch()
        found, expected = ranked.eval()(batch(9))[0], native.eval()(batch(9))[0]
        torch.testing.assert_close(found, expected)
        ranked.train(), native.train()


def test_phi_is_the_same_in_one_batch_and_in_four() -> None:
    phi = mb.PhiBalancing(strength=STRENGTH, rate=0.5, peek=False)
    whole, cut = Tower(), Tower()
    handles = [attach(model, phi) for model in (whole, cut)]
    for step in range(3):
        everything = batch(step)
        divisor = torch.tensor(float(SEQUENCES * LENGTH))
        expected = gradients(whole, [everything], divisor)
        found = gradients(cut, list(everything.split(1)), divisor)
        for model in (whole, cut):
            model.post_batch()
    assert_equal(found, expected)
    for one, other in zip(*(handle.layers.values() for handle in handles), strict=True):
        for name, value in one.state_dict().items():
            if "last_step" not in name:
                torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_dry_run_and_evaluation_leave_the_state_alone() -> None:
    model = Tower()
    balancing = attach(model, mb.LossFree())
    gradients(model, [batch()])
    model.post_batch(dry_run=True)
    model.eval()(batch())
    model.post_batch()
    assert balancing.steps == 0
    assert not any(layer.running.any() for layer in balancing.layers.values())


def test_forced_routing_is_balanced_here_too() -> None:
    model = Tower()
    balancing = attach(model, Forced("balanced"))
    gradients(model, [batch()])
    model.post_batch()
    assert balancing.metrics()["maxvio"] == 0
    assert balancing.metrics()["tokens"] == SEQUENCES * LENGTH


def test_detaching_gives_the_router_its_methods_back() -> None:
    model, stock = Tower(bias_gamma=0.01), Tower(bias_gamma=0.01)
    with attach(model, mb.SwitchLoss()):
        pass
    for one in (model, stock):
        gradients(one, [batch()])
        one.post_batch()
    for mine, theirs in zip(model.routers, stock.routers, strict=True):
        assert mine.score_bias.any()
        assert torch.equal(mine.score_bias, theirs.score_bias)


class MoERouterV2(nn.Module):
    """By its name that of OLMo-core's second generation."""


@pytest.mark.parametrize(
    ("settings", "method", "message"),
    [
        ({"lb_loss_weight": 0.01}, mb.PhiBalancing(), r"routers\.0 has lb_loss_weight=0\.01"),
        ({"uniform_expert_assignment": True}, mb.PhiBalancing(), "uniform_expert_assignment=True"),
        ({"random_expert_assignment": True}, mb.PhiBalancing(), "random_expert_assignment=True"),
        ({"bias_gamma": 0.01}, mb.Sinkhorn(), "bias_gamma=None"),
        ({"gating_function": "topk_softmax"}, mb.PhiBalancing(), "'topk_softmax'"),
    ],
)
def test_settings_that_would_be_ignored_or_doubled_are_refused(
    settings: dict[str, Any], method: mb.Method, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attach(Tower(**settings), method)


def test_models_that_cannot_be_balanced_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no MoELinearRouter"):
        attach(nn.Linear(2, 2), mb.PhiBalancing())
    with pytest.raises(ValueError, match="1 is a MoERouterV2"):
        attach(nn.Sequential(Tower(), MoERouterV2()), mb.PhiBalancing())
    model = Tower()
    attach(model, mb.PhiBalancing())
    with pytest.raises(ValueError, match=r"routers\.0 is balanced already"):
        attach(model, mb.PhiBalancing())
    frozen = Tower()
    frozen.routers[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"routers\.1 is frozen"):
        attach(frozen, mb.PhiBalancing())
    router = MoELinearRouter(d_model=WIDTH, num_experts=EXPERTS, top_k=TOP_K)
    assert attach(router, mb.PhiBalancing()).layers.keys() == {"router"}


def test_the_snippet_of_the_page_attaches_to_what_a_configuration_builds() -> None:
    code, _ = (block.code for block in blocks(PAGE, "python"))
    names: dict[str, Any] = {"config": SimpleNamespace(build=Tower)}
    exec(code, names)
    gradients(names["model"], [batch()])
    names["model"].post_batch()
    assert names["balancing"].steps == 1
