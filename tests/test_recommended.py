"""What `attach` takes if you name no method, on routers of each kind."""

from __future__ import annotations

import pytest
import torch

import moebalance as mb
from families import loss, tiny, tokens

PHI = mb.PhiBalancing()
NATS = mb.Together(PHI, mb.LossFree(scale="nats"))
NATIVE = mb.Together(PHI, mb.SMEBU())


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen3_moe", NATS),
        ("mixtral", NATS),
        ("deepseek_v3", NATIVE),  # has a selection bias, and limits its choice by groups
        ("glm4_moe", NATIVE),
        ("dbrx", PHI),  # nothing outside the block can change its choice
        ("mistral4", PHI),  # limits its choice by groups, without a bias
    ],
)
def test_a_model_gets_the_form_that_its_routers_allow(family, method):
    model = tiny(family)
    with mb.attach(model) as balancing:
        assert balancing.method == method
        loss(model, tokens()).backward()
        balancing.step()
        assert balancing.metrics()["maxvio"] >= 0


def test_a_model_with_a_bias_of_its_own_holds_the_whole_price_in_its_weights():
    model, ids = tiny("deepseek_v3"), tokens()
    with mb.attach(model) as balancing:
        for _ in range(3):
            loss(model, ids).backward()
            balancing.step()
        biased = model.eval()(ids).logits
        weights = {name: value.clone() for name, value in model.state_dict().items()}
    plain = tiny("deepseek_v3")
    plain.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, biased)


def test_your_own_router_takes_it_by_name():
    router = mb.BalancedRouter(mb.recommended(), num_experts=8, top_k=2)
    balancing = mb.attach(router)
    logits = torch.randn(4, 16, 8, requires_grad=True)
    weights, _ = router(logits)
    weights.square().sum().backward()
    balancing.step()
    assert balancing.method == NATS
    assert balancing.metrics()["tokens"] == 64


@pytest.mark.parametrize(
    ("told", "method"),
    [
        ({"normalize": True}, NATS),
        ({"gate": mb.Sigmoid()}, NATS),
        ({}, PHI),  # another choice would change weights that are not normalised
        ({"normalize": False}, PHI),
    ],
)
def test_named_routers_get_what_leaves_their_weights_alone(told, method):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False))
    with mb.attach(model, routers="0", top_k=2, **told) as balancing:
        assert balancing.method == method
