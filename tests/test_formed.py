"""A batch is counted and charged where another's router has formed its affinities."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import families
from cases import METHODS, commit
from moebalance import PhiBalancing, Sigmoid, Softmax, SqrtSoftplus, attach
from moebalance.core import autograd, formed, layer
from moebalance.core.layer import LayerBalance

TOKENS, EXPERTS, TOP_K = 24, 6, 2
FROM_SUMS = [name for name, method in METHODS.items() if method.traits.from_sums]


def mixtral(z):
    weights, experts = z.softmax(dim=-1).topk(TOP_K, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, experts


def qwen(z):
    """In half precision, with scores in float32."""
    weights, experts = torch.softmax(z, dim=-1, dtype=torch.float).topk(TOP_K, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(z.dtype), experts


def deepseek(z):
    scores = z.sigmoid()
    experts = (scores + 0.01).topk(TOP_K, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5, experts


ROUTERS = {
    "mixtral": (mixtral, Softmax(), torch.float64),
    "qwen": (qwen, Softmax(), torch.bfloat16),
    "deepseek": (deepseek, Sigmoid(), torch.float64),
}
every_router = pytest.mark.parametrize(
    ("route", "gate", "dtype"), ROUTERS.values(), ids=list(ROUTERS)
)


def logits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    lean = torch.linspace(-1, 1, EXPERTS, dtype=torch.float64)
    z = torch.randn(TOKENS, EXPERTS, generator=generator, dtype=torch.float64) + lean
    return z.to(dtype).requires_grad_()


def charged(route, gate, dtype, name, *, mask=None, weight=None, joined):
    """The gradient at the logits and the step's sums of three batches in two steps."""
    own = LayerBalance(METHODS[name], EXPERTS, gate=gate)
    own.loss_scale.fill_(3.0)
    for _ in range(3):
        z = logits(dtype)
        weights, experts = route(z)
        assert formed.find(weights, z, gate) is not None
        if joined:
            weights = own.tie(weights, z, experts, mask=mask, weight=weight)
        else:
            how = own.pass_for(z, experts.shape[-1], weight=weight)
            weights = autograd.tie(weights, how, logits=z, experts=experts, mask=mask)
        (weights * torch.arange(1.0, TOP_K + 1)).sum().backward()
        commit(own)
    return z.grad, own.last_total


@every_router
@pytest.mark.parametrize("name", FROM_SUMS)
@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
def test_a_charge_at_the_affinities_is_the_charge_at_the_logits(route, gate, dtype, name, padded):
    mask = torch.arange(TOKENS) % 5 > 0 if padded else None
    weight = torch.tensor(0.5) if padded else None
    (mine, my_sums), (other, sums) = (
        charged(route, gate, dtype, name, mask=mask, weight=weight, joined=joined)
        for joined in (True, False)
    )
    tolerance = (
        {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 0.02, "atol": 1e-3}
    )
    torch.testing.assert_close(mine, other, **tolerance)
    torch.testing.assert_close(my_sums, sums)


def test_only_the_affinities_of_these_very_logits_are_taken():
    z = logits()
    for weights, of, gate in [
        (z.softmax(dim=0).topk(2).values, z, Softmax()),  # over tokens
        ((z * 2).softmax(dim=-1).topk(2).values, z, Softmax()),  # of others
        (z.softmax(dim=-1).topk(2).values, z * 1, Softmax()),
        (z.sigmoid().topk(2).values, z, Softmax()),  # of another gate
        (z.topk(2).values.softmax(dim=-1), z, Softmax()),  # of the chosen ones alone
        (z.softmax(dim=-1)[:, :2] * 2, z, Softmax()),  # by a view, whose gradient is not its own
        (torch.nn.functional.softplus(z).sqrt().topk(2).values, z, SqrtSoftplus()),
        (torch.ones(3), z, Softmax()),
    ]:
        assert formed.find(weights, of, gate) is None
    assert formed.find(z.softmax(dim=-1).topk(2).values, z, Softmax()) is not None
    assert formed.find(z.softmax(dim=1).topk(2).values * 2 + 1, z, Softmax()) is not None


@pytest.mark.parametrize("name", ["_current_node", "_packing_hooks"])
def test_a_release_of_torch_without_its_inner_functions_forms_affinities_anew(name, monkeypatch):
    monkeypatch.setattr(formed, name, None)
    own = LayerBalance(PhiBalancing(strength=1.0), EXPERTS)
    z = logits()
    weights, experts = mixtral(z)
    assert formed.find(weights, z, Softmax()) is None
    own.tie(weights, z, experts).sum().backward()
    assert own.running[-1] == 1


def test_affinities_in_half_precision_are_formed_anew_and_counted_beyond_256():
    own = LayerBalance(PhiBalancing(), EXPERTS)
    z = torch.zeros(1000, EXPERTS, dtype=torch.bfloat16)
    z[:, 0] = 5.0
    z.requires_grad_()
    weights, experts = z.softmax(dim=-1).topk(1)
    assert formed.find(weights, z, Softmax()) is None
    own.tie(weights, z, experts).sum().backward()
    commit(own)
    assert own.last_sums.counts[0] == 1000
    assert own.last_sums.counts.dtype == torch.float32


def test_a_weight_that_gets_no_gradient_of_its_own_is_charged():
    own = LayerBalance(PhiBalancing(strength=1.0), EXPERTS)
    z = logits()
    weights, experts = mixtral(z)
    weights = own.tie(weights, z, experts)
    (weights * 0).sum().backward()
    assert z.grad.abs().max() > 0
    assert own.running[-1] == 1


def test_checkpointed_activations_are_unpacked_once_and_counted_once():
    own = LayerBalance(PhiBalancing(strength=1.0), EXPERTS)
    z = logits()

    def block(z):
        weights, experts = mixtral(z)
        return own.tie(weights, z, experts)

    checkpoint(block, z, use_reentrant=False).sum().backward()
    assert own.running[-1] == 1
    with torch.autograd.graph.save_on_cpu():
        block(z).sum().backward()
    assert own.running[-1] == 2


def test_the_graph_of_a_batch_is_freed_without_the_garbage_collector():
    own = LayerBalance(PhiBalancing(), EXPERTS)
    gc.disable()
    try:
        z = logits()
        alive = weakref.ref(z)
        weights, experts = mixtral(z)
        tied = own.tie(weights, z, experts)
        tied.sum().backward()
        del z, weights, tied
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe"])
def test_common_routers_form_their_affinities_once(family, monkeypatch):
    joined = []
    monkeypatch.setattr(
        layer, "join", lambda *args, **more: joined.append(formed.join(*args, **more))
    )
    model = families.tiny(family)
    with attach(model, PhiBalancing()) as balancing:
        for module in model.modules():  # as where our pass does not stand in for the router's
            vars(module).pop("forward", None)
        families.loss(model, families.tokens()).backward()
        balancing.step()
        assert len(joined) == len(balancing.layers) == 2
        assert all(each.last_sums.tokens > 0 for each in balancing.layers.values())
