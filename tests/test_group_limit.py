"""A choice within the best groups of experts, in a router of ours under every kind of method."""

from __future__ import annotations

import re

import pytest
import torch

from cases import random_logits
from moebalance import (
    BalancedRouter,
    GroupLimit,
    LossFree,
    Method,
    NoBalancing,
    PhiBalancing,
    Sigmoid,
    Sinkhorn,
    Softmax,
)
from moebalance.core.state import method_name
from moebalance.gates import Gate
from moebalance.kernels.plain import ranking

TOKENS, EXPERTS, TOP_K = 65, 24, 5
LIMITS = [GroupLimit(6, 3), GroupLimit(6, 2, best=1), GroupLimit(3, 1, best=4)]

every_limit = pytest.mark.parametrize("limit", LIMITS, ids=str)
every_gate = pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=["softmax", "sigmoid"])
every_method = pytest.mark.parametrize(
    "method", [PhiBalancing(strength=0.5), LossFree(), NoBalancing()], ids=method_name
)


def router(method: Method, gate: Gate, limit: GroupLimit | None, *, fused: bool = True):
    made = BalancedRouter(method, EXPERTS, TOP_K, gate=gate, limit=limit, fused=fused)
    if method.traits.has_selection_price:
        made.get_buffer("state_price").copy_(torch.linspace(0, 0.05, EXPERTS))
    return made


def groups_of(experts: torch.Tensor, limit: GroupLimit) -> torch.Tensor:
    """How many groups each token's experts lie in."""
    groups = experts // (EXPERTS // limit.groups)
    return torch.zeros(len(experts), limit.groups).scatter(-1, groups, 1.0).sum(dim=-1)


@every_limit
@every_gate
@every_method
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_choice_is_the_best_of_the_best_groups(method, gate, limit, training):
    made = router(method, gate, limit).train(training)
    logits = random_logits(TOKENS, EXPERTS, seed=0).requires_grad_()
    _, experts = made(logits)
    expected = ranking(logits.detach(), gate, made.price, limit)[:, :TOP_K]
    assert torch.equal(experts.sort(dim=-1).values, expected.sort(dim=-1).values)
    assert groups_of(experts, limit).max() <= limit.top_groups
    _, free = router(method, gate, None)(logits)
    assert groups_of(free, limit).max() > limit.top_groups


@every_limit
def test_a_method_with_a_ranking_of_its_own_is_limited_too(limit):
    made = BalancedRouter(Sinkhorn(), EXPERTS, TOP_K, limit=limit)
    logits = random_logits(TOKENS, EXPERTS, seed=1)
    _, experts = made(logits.requires_grad_())
    assert groups_of(experts, limit).max() <= limit.top_groups
    ranks = made.preference(logits, None, training=True)
    assert ranks is not None
    assert torch.equal(experts, limit.within(ranks).topk(TOP_K, sorted=False).indices)


def test_groups_that_are_all_kept_limit_nothing():
    logits = random_logits(TOKENS, EXPERTS, seed=2)
    limited, free = (router(NoBalancing(), Sigmoid(), x)(logits) for x in (GroupLimit(6, 6), None))
    assert all(torch.equal(a, b) for a, b in zip(limited, free, strict=True))


@pytest.mark.parametrize(
    "limit", [GroupLimit(5, 2), GroupLimit(6, 7), GroupLimit(6, 1), GroupLimit(6, 2, 5)], ids=str
)
def test_a_limit_that_does_not_fit_is_refused(limit):
    with pytest.raises(ValueError, match=re.escape(str(limit))):
        BalancedRouter(NoBalancing(), EXPERTS, TOP_K, limit=limit)


def trained(method: Method, gate: Gate, limit: GroupLimit, *, fused: bool):
    """Weights, choice, gradient and what was counted, told by expert."""
    made = router(method, gate, limit, fused=fused)
    logits = random_logits(TOKENS, EXPERTS, seed=3).requires_grad_()
    weights, experts = made(logits)
    upstream = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    weights.backward(upstream.gather(-1, experts) / TOKENS)
    told = torch.zeros(TOKENS, EXPERTS).scatter(-1, experts, weights.detach())
    return told, logits.grad, made.running, "_ChooseFused" in weights.grad_fn.name()


@every_limit
@every_gate
@every_method
def test_fused_training_is_plain_training(method, gate, limit, interpreted):
    *found, fused = interpreted(trained, method, gate, limit, fused=True)
    *expected, plain = trained(method, gate, limit, fused=False)
    assert fused
    assert not plain
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# torch.compile's own: Dynamo instantiates the functions that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@every_gate
def test_it_compiles_to_one_graph(gate):
    logits = random_logits(TOKENS, EXPERTS, seed=4).requires_grad_()

    def found(compile_it: bool):
        made = router(PhiBalancing(strength=0.5), gate, LIMITS[0])
        run = torch.compile(made, fullgraph=True, backend="aot_eager") if compile_it else made
        weights, experts = run(logits)
        (gradient,) = torch.autograd.grad(weights.square().mean(), logits)
        return experts, weights, gradient, made.running

    for a, b in zip(found(True), found(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_a_batch_without_a_token_and_padding_are_routed_as_without_a_limit():
    made = router(PhiBalancing(), Sigmoid(), LIMITS[0])
    for mode in (True, False):
        weights, experts = made.train(mode)(torch.zeros(0, EXPERTS, requires_grad=True))
        assert weights.shape == experts.shape == (0, TOP_K)
    logits = random_logits(TOKENS, EXPERTS, seed=5).requires_grad_()
    mask = torch.arange(TOKENS) % 3 > 0
    weights, experts = made.train()(logits, mask)
    weights.sum().backward()
    counts = torch.bincount(experts[mask].flatten(), minlength=EXPERTS)
    assert torch.equal(made.running[EXPERTS : 2 * EXPERTS], counts.float())


def test_experts_ranked_at_minus_infinity_are_taken_before_those_out_of_reach():
    """Sinkhorn ranks so what the logits exclude."""
    made = BalancedRouter(Sinkhorn(), EXPERTS, TOP_K, limit=GroupLimit(3, top_groups=1))
    logits = random_logits(TOKENS, EXPERTS, seed=6)
    logits[:, ::2] = -torch.inf
    _, experts = made(logits.requires_grad_())
    assert groups_of(experts, GroupLimit(3, top_groups=1)).max() == 1


@pytest.mark.parametrize("limit", [4, (8, 4), GroupLimit(6.0, 3)], ids=str)
def test_what_is_no_limit_is_refused(limit):
    with pytest.raises(TypeError, match=r"must be"):
        BalancedRouter(NoBalancing(), EXPERTS, TOP_K, limit=limit)
