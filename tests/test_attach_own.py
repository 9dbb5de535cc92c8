"""Attaching to a model of BalancedRouters: once at a time, by name, and away again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moebalance as mb


def model(method: mb.Method | None = None) -> nn.Sequential:
    method = method or mb.Together(mb.PhiBalancing(strength=0.5), mb.LossFree(speed=0.1))
    return nn.Sequential(
        *[mb.BalancedRouter(method, 4, 2) for _ in range(3)],
    )


def train(model: nn.Sequential, layer: int) -> torch.Tensor:
    logits = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_()
    weights, _ = model[layer](logits)
    weights[:, 0].sum().backward()
    return logits.grad


def test_a_second_attachment_to_own_routers_is_refused_until_the_first_is_gone() -> None:
    own = model()
    first = mb.attach(own)
    with pytest.raises(ValueError, match="0 is balanced already: detach"):
        mb.attach(own)
    mb.attach(copy.deepcopy(own))  # a copy is another model
    first.detach()
    second = mb.attach(own)
    train(own, 0)
    second.step()
    assert second.metrics()["tokens"] == 6


def test_the_method_that_the_routers_carry_may_be_named_again_and_no_other() -> None:
    own = model(mb.SwitchLoss(strength=0.1))
    with pytest.raises(ValueError, match=r"carry \{SwitchLoss\(strength=0\.1\)\}: call attach"):
        mb.attach(own, mb.SwitchLoss(strength=0.2))
    assert mb.attach(own, mb.SwitchLoss(strength=0.1)).method == mb.SwitchLoss(strength=0.1)


def test_detaching_stops_counting_and_charging_and_restores_fused() -> None:
    own = model(mb.PhiBalancing(strength=0.5))
    own[1].fused = False
    balancing = mb.attach(own, fused=False)
    charged = train(own, 0)
    balancing.step()
    assert not any(router.fused for router in own)
    balancing.detach()
    assert [router.fused for router in own] == [True, False, True]
    free = train(own, 0)
    assert own[0].running.abs().sum() == 0
    assert not torch.equal(free, charged)
    plain = mb.BalancedRouter(mb.NoBalancing(), 4, 2)
    assert torch.equal(train(nn.Sequential(plain), 0), free)


def test_a_trained_price_is_part_of_an_own_router_and_stays() -> None:
    own = model(mb.LossFree(speed=0.1))
    balancing = mb.attach(own, layers="0")
    train(own, 0)
    balancing.step()
    price, (_, experts) = own[0].price.clone(), own[0](torch.zeros(2, 4))
    balancing.detach()
    assert price.abs().max() > 0
    assert torch.equal(own[0].price, price)
    assert torch.equal(own[0](torch.zeros(2, 4))[1], experts)


@pytest.mark.parametrize("layers", ["1", ["1"], lambda name: name == "1"])
def test_layers_chooses_own_routers_and_the_others_rest(layers: object) -> None:
    own = model()
    balancing = mb.attach(own, layers=layers)
    assert list(balancing.layers) == ["1"]
    for layer in range(3):
        train(own, layer)
    assert [bool(router.running.any()) for router in own] == [False, True, False]


def test_a_pattern_that_chooses_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers='7\*' chooses none of the model's 3 routers"):
        mb.attach(model(), layers=["0", "7*"])


def test_routers_of_several_methods_attach_apart_each_kind_by_itself() -> None:
    methods = [mb.LossFree(speed=0.1), mb.LossFree(speed=0.1), mb.SwitchLoss(strength=0.1)]
    mixed = nn.Sequential(*[mb.BalancedRouter(method, 4, 2) for method in methods])
    with pytest.raises(ValueError, match=r"attach each kind by itself, for example attach\(model"):
        mb.attach(mixed)
    first = mb.attach(mixed, layers="[01]")
    assert mixed[2].at_rest
    second = mb.attach(mixed, layers="2")
    assert not any(router.at_rest for router in mixed)
    for layer in range(3):
        train(mixed, layer)
    for balancing, layers in ((first, 2), (second, 1)):
        balancing.step()
        assert len(balancing.layers) == layers
        assert balancing.metrics()["tokens"] == 6
    with pytest.raises(ValueError, match="2 is balanced already"):
        mb.attach(mixed, layers="2")
