"""The benchmark's variants that call packages of others route as those are meant to."""

from __future__ import annotations

import pytest
import torch

from moebalance import LossFree, SwitchLoss
from moebalance.lab.bench.variants import (
    RULES,
    STRENGTH,
    BareRouter,
    MegatronLoss,
    Ours,
    Rule,
    TorchtitanRouter,
    others,
)

# The packages tell of what is not installed, and of their own old names, as they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")

EXPERTS, TOP_K = 16, 4

every_rule = pytest.mark.parametrize("rule", RULES)


def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, EXPERTS, generator=generator).requires_grad_()


def gradient(variant, z: torch.Tensor) -> torch.Tensor:
    weights, term = variant(z)
    loss = weights.square().mean()
    (found,) = torch.autograd.grad(loss if term is None else loss + term, z)
    return found


def test_both_packages_are_compared_where_they_are_installed() -> None:
    found = others(EXPERTS, TOP_K, "softmax")
    assert isinstance(found["Megatron-Core's function"], MegatronLoss)
    assert isinstance(found["torchtitan's router"], TorchtitanRouter)


@every_rule
def test_torchtitans_router_weighs_as_the_bare_one_and_counts_its_choice(rule: Rule) -> None:
    z = logits()
    router = TorchtitanRouter(rule, TOP_K, EXPERTS)
    weights, term = router(z)
    expected, _ = BareRouter(rule, TOP_K)(z)
    assert term is None
    torch.testing.assert_close(weights.sort(dim=-1, descending=True).values, expected)
    chosen = z.topk(TOP_K).indices.flatten()
    assert torch.equal(router.counts, torch.bincount(chosen, minlength=EXPERTS).float())


@every_rule
def test_torchtitans_bias_chooses_as_ours_does(rule: Rule) -> None:
    z, price = logits(), torch.linspace(0, 0.3, EXPERTS)
    ours = Ours(LossFree(), EXPERTS, TOP_K, rule)
    ours.router.get_buffer("state_price").copy_(price)
    theirs = TorchtitanRouter(rule, TOP_K, EXPERTS)
    theirs.bias = -price
    torch.testing.assert_close(gradient(theirs, z), gradient(ours, z), rtol=1e-4, atol=1e-9)
    assert (gradient(ours, z) - gradient(BareRouter(rule, TOP_K), z)).abs().max() > 1e-5


@every_rule
def test_megatrons_function_has_the_gradient_of_our_switch_loss(rule: Rule) -> None:
    z = logits()
    ours = gradient(Ours(SwitchLoss(STRENGTH), EXPERTS, TOP_K, rule), z)
    torch.testing.assert_close(gradient(MegatronLoss(rule, TOP_K), z), ours, rtol=1e-4, atol=1e-8)
    assert (ours - gradient(BareRouter(rule, TOP_K), z)).abs().max() > 1e-6
