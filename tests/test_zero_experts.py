"""Routers that also choose among experts that compute nothing: served with shares, else refused."""

from __future__ import annotations

import pytest
import torch

import moebalance as mb
from families import EXPECTED, loss, tiny, tokens
from moebalance import metrics

ZERO = ["longcat_flash", "zaya"]


def aimed(family: str) -> mb.PhiBalancing:
    potential = mb.NegativeEntropy().relative_to(EXPECTED[family].shares)
    return mb.PhiBalancing(potential, strength=0.1)


@pytest.mark.parametrize("family", ZERO)
def test_a_method_that_would_use_all_alike_is_refused(family):
    model = tiny(family)
    phi = aimed(family)
    for method in (
        mb.PhiBalancing(),
        mb.SwitchLoss(),
        mb.Together(phi, mb.LossFree()),
        mb.Together(mb.ZLoss(), mb.SwitchLoss()),
    ):
        with pytest.raises(ValueError, match=r"equal use of all would .* proportions"):
            mb.attach(model, method)
    mb.attach(model, mb.Together(mb.ZLoss(), phi)).detach()
    mb.attach(model, mb.NoBalancing()).detach()


@pytest.mark.parametrize("family", ZERO)
def test_every_choice_of_a_token_is_counted_those_of_nothing_too(family):
    model, expected, ids = tiny(family), EXPECTED[family], tokens()
    handle = mb.attach(model, mb.Together(aimed(family), mb.LossFree(proportions=expected.shares)))
    loss(model, ids).backward()
    handle.step()
    for hard, soft in handle.loads().values():
        assert hard.shape == soft.shape == (expected.num_experts + expected.empty,)
    for layer in handle.layers.values():
        assert layer.last_sums.counts.sum() == expected.top_k * ids.numel()
    assert handle.metrics()["aim_gap"] > 0


def test_a_token_that_skips_zayas_layer_is_counted_as_skipping():
    model, ids = tiny("zaya"), tokens()
    routers = [m for m in model.modules() if type(m).__name__ == "ZayaRouter"]
    for router in routers:
        router.balancing_biases.fill_(0.0)
        router.balancing_biases[-1] = 10.0  # nobody wants anything else
    handle = mb.attach(model, mb.NoBalancing())
    loss(model, ids).backward()
    handle.step()
    for layer in handle.layers.values():
        assert layer.last_sums.counts[-1] == ids.numel()


def test_the_share_of_what_computes_nothing_is_the_one_that_was_chosen():
    """Only the routers train; from nearly even the soft load goes to the shares."""
    family = "longcat_flash"
    model, shares = tiny(family), EXPECTED[family].shares
    handle = mb.attach(model, mb.PhiBalancing(aimed(family).potential, strength=1.0, rate=1.0))
    names = tuple(handle.layers)
    routers = [p for n, p in model.named_parameters() if n.startswith(names)]
    optimizer = torch.optim.Adam(routers, lr=0.01)
    ids = tokens(batch=8)
    gaps = []
    for _ in range(25):
        optimizer.zero_grad()
        loss(model, ids).backward()
        optimizer.step()
        handle.step()
        rho = torch.tensor(shares) / sum(shares)
        gaps.append([metrics.soft_hard_gap(rho, soft) for _, soft in handle.loads().values()])
    assert torch.tensor(gaps[-1]).max() < 0.5 * torch.tensor(gaps[0]).min()
