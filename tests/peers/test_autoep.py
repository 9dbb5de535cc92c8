"""DeepSpeed AutoEP: its router under our methods against one of our own, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import Tensor, nn

import moebalance as mb
from moebalance.integrations import deepspeed_autoep
from moebalance.methods.forced import Forced

EXPERTS, TOP_K, WIDTH, TOKENS = 8, 2, 16, 64
attach = deepspeed_autoep.attach


def make_router(*, score: str = "softmax", groups: int | None = None, seed: int = 0) -> Any:
    router = TokenChoiceTopKRouter(
        dim=WIDTH,
        num_experts=EXPERTS,
        num_expert_groups=groups,
        num_limited_groups=groups and 2,
        top_k=TOP_K,
        score_func=score,
        route_norm=True,
        route_scale=1.0,
        gate_bias=False,
    )
    generator = torch.Generator().manual_seed(seed)
    router.gate.weight.data = torch.randn(EXPERTS, WIDTH, generator=generator) / 2
    return router


def batch(seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)) + 0.3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "method",
    [
        mb.PhiBalancing(strength=0.1),
        mb.SwitchLoss(0.1),
        mb.LossFree(speed=0.02),
        mb.Together(mb.PhiBalancing(strength=0.1), mb.LossFree(speed=0.02)),
    ],
    ids=["phi", "switch", "loss-free", "both"],
)
def test_every_step_is_that_of_a_router_of_our_own(method: mb.Method, score: str) -> None:
    theirs = make_router(score=score)
    gate = {"softmax": mb.Softmax(), "sigmoid": mb.Sigmoid()}[score]
    ours = mb.BalancedRouter(method, EXPERTS, TOP_K, gate=gate)
    weight = theirs.gate.weight.detach().clone().requires_grad_()
    balancing, reference = attach(theirs, method), mb.attach(ours)
    for step in range(4):
        theirs.gate.weight.grad = weight.grad = None
        for half in batch(step).chunk(2):
            scores, experts, counts = theirs(half)
            (balancing.follow(scores.square().sum()) / 2).backward()
            weights, expected = ours(half @ weight.T)
            (reference.follow(weights.square().sum()) / 2).backward()
            assert torch.equal(experts.sort().values, expected.sort().values)
            assert torch.equal(counts, torch.bincount(experts.flatten(), minlength=EXPERTS).int())
        torch.testing.assert_close(theirs.gate.weight.grad, weight.grad, rtol=1e-4, atol=1e-7)
        balancing.step()
        reference.step()
    (layer,) = balancing.layers.values()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=0, atol=1e-6)


def test_a_price_goes_on_from_the_models_bias_and_respects_groups() -> None:
    router = make_router(score="sigmoid", groups=4)
    bias = torch.linspace(-0.2, 0.2, EXPERTS)
    del router.e_score_correction_bias
    router.register_buffer("e_score_correction_bias", bias.clone())
    expected = router(batch())
    balancing = attach(router, mb.LossFree(speed=0.05))
    for found, before in zip(router(batch()), expected, strict=True):
        assert torch.equal(found, before)
    router(batch())[0].sum().backward()
    balancing.step()
    (layer,) = balancing.layers.values()
    assert torch.equal(router.e_score_correction_bias, -layer.price)
    assert not torch.equal(router.e_score_correction_bias, bias)
    balancing.detach()
    assert torch.equal(router.e_score_correction_bias, bias)


def test_a_router_without_a_bias_is_as_it_was_after_detaching() -> None:
    router = make_router()
    expected = router(batch())
    with attach(router, mb.LossFree(speed=1.0)) as balancing:
        router(batch())[0].sum().backward()
        balancing.step()
        assert not torch.equal(router(batch())[1], expected[1])
    assert router.e_score_correction_bias is None
    for found, before in zip(router(batch()), expected, strict=True):
        assert torch.equal(found, before)


def test_evaluation_counts_nothing_and_is_watched() -> None:
    router = make_router()
    balancing = attach(router, mb.SwitchLoss())
    balancing.watch()
    router.eval()(batch())
    found, _ = balancing.evaluation()
    assert found["tokens"] == TOKENS
    assert not next(iter(balancing.layers.values())).running.any()


def test_models_and_methods_that_cannot_be_balanced_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no router of AutoEP's"):
        attach(nn.Linear(2, 2), mb.SwitchLoss())
    for method in (mb.Sinkhorn(), Forced("balanced"), mb.LossFree(scale="nats")):
        with pytest.raises(ValueError, match="chooses experts by itself"):
            attach(make_router(), method)
    router = make_router()
    router.gate.weight.requires_grad_(False)
    attach(router, mb.LossFree()).detach()
    with pytest.raises(ValueError, match="is frozen"):
        attach(router, mb.SwitchLoss())
    twice = nn.Sequential(make_router())
    attach(twice, mb.SwitchLoss())
    with pytest.raises(ValueError, match="0 is balanced already"):
        attach(twice, mb.SwitchLoss())
