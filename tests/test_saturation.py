"""Logits so large that affinities are equal: σ(25) is 1 in float32, as σ(20) is.

Top-k of equal affinities takes the first experts, for every token. Here it goes by the logits
wherever no price asks otherwise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moebalance as mb
from cases import METHODS
from moebalance import GroupLimit
from moebalance.gates import Gate, top_experts
from moebalance.kernels import choose, plain

TOKENS, EXPERTS, TOP_K = 256, 16, 2


def logits_of(gate: Gate, experts: int = EXPERTS) -> Tensor:
    """Sigmoids that are all 1, or a softmax whose leader is 110 ahead of all others."""
    spread = torch.randn(TOKENS, experts, generator=torch.Generator().manual_seed(0))
    if isinstance(gate, mb.Softmax):
        return spread.index_fill(-1, torch.tensor([3]), 115.0)
    return 25 + 3 * spread


def by_expert(experts: Tensor) -> Tensor:
    return experts.sort(dim=-1).values


GATES: list[Any] = [mb.Softmax(), mb.Sigmoid()]
SELECTING = {
    name: method
    for name, method in METHODS.items()
    if method.traits.selects and not name.startswith(("sinkhorn", "forced"))
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("name", ["none", "switch", "z-loss", *SELECTING])
def test_a_router_ranks_logits_before_a_price_has_moved(name, gate, training):
    router = mb.BalancedRouter(METHODS[name], EXPERTS, TOP_K, gate=gate).train(training)
    logits = logits_of(gate)
    _, experts = router(logits.clone().requires_grad_())
    assert torch.equal(by_expert(experts), by_expert(logits.topk(TOP_K).indices))


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("name", SELECTING)
def test_experts_of_equal_price_are_ranked_by_logits(name, gate):
    """Every second expert is dear: the others are chosen by their logits alone."""
    router = mb.BalancedRouter(METHODS[name], EXPERTS, TOP_K, gate=gate)
    dear = torch.arange(EXPERTS) % 2 == 0  # not the softmax leader
    price = 50.0 if name.endswith("nats") else 0.01  # logarithms do not saturate
    router.adopt(torch.where(dear, price, -price))
    logits = logits_of(gate)
    _, experts = router(logits.clone().requires_grad_())
    expected = logits.masked_fill(dear, float("-inf")).topk(TOP_K).indices
    assert torch.equal(by_expert(experts), by_expert(expected))


def drawn(seed: int, spread: float) -> Tensor:
    return spread * torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))


HARD = {
    "mild logits": (drawn(1, 2.0), drawn(2, 1.0)[0]),
    "an expert that is never chosen, and ever cheaper": (
        drawn(1, 2.0).index_fill(-1, torch.tensor([5]), float("-inf")),
        drawn(2, 1.0)[0].index_fill(-1, torch.tensor([5]), -120.0),
    ),
    "prices 80 nats apart": (drawn(1, 2.0), torch.linspace(-40, 40, EXPERTS)),
    "low logits, and a tie in one row": (
        (drawn(1, 2.0) - 22).index_fill(0, torch.tensor([0]), -22.0),
        drawn(2, 1.0)[0].index_fill(-1, torch.tensor([5]), -15.0),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", [mb.Sigmoid(), mb.SqrtSoftplus()], ids=str)
@pytest.mark.parametrize("case", HARD)
def test_a_price_in_nats_is_subtracted_from_logarithms_however_large(case, gate, training):
    logits, price = HARD[case]
    router = mb.BalancedRouter(mb.LossFree(scale="nats"), EXPERTS, TOP_K, gate=gate)
    router.adopt(price)
    _, experts = router.train(training)(logits.clone().requires_grad_())
    ranked = gate.log_affinity(logits.double()) - price.double()
    rows = slice(1, None)  # of the first one, all may be equal
    assert torch.equal(by_expert(experts)[rows], by_expert(ranked.topk(TOP_K).indices)[rows])


def test_a_price_is_never_outweighed_by_a_logit():
    """1e-6 is far below any step of a price, and 60 far above any difference of logits."""
    logits = torch.tensor([[30.0, -30.0, -30.0]])
    assert top_experts(torch.tensor([[0.5 - 1e-6, 0.5, 0.5]]), logits, 2).sum() == 1 + 2
    assert top_experts(torch.tensor([[0.5, 0.5, 0.5]]), logits, 1) == 0
    assert top_experts(torch.tensor([[0.5 - 1e-6, 0.5, 0.5]]), logits, 1) in (1, 2)


def test_training_loss_free_under_saturation_balances_as_it_does_elsewhere():
    """Chosen by index, every batch goes to two of the experts: MaxVio 7.0."""
    router = mb.BalancedRouter(mb.LossFree(), EXPERTS, TOP_K, gate=mb.Sigmoid())
    balancing = mb.attach(router)
    for _ in range(2):
        router(logits_of(mb.Sigmoid()).requires_grad_())[0].sum().backward()
        balancing.step()
    assert balancing.metrics()["maxvio"] < 2.5


@pytest.mark.parametrize("method", [mb.PhiBalancing(), mb.LossFree()], ids=["phi", "loss-free"])
def test_groups_of_equal_affinities_are_ranked_by_logits(method):
    limit = GroupLimit(4, top_groups=1)
    router = mb.BalancedRouter(method, EXPERTS, TOP_K, gate=mb.Sigmoid(), limit=limit)
    logits = logits_of(mb.Sigmoid())
    _, experts = router(logits.clone().requires_grad_())
    expected = limit.within(logits).topk(TOP_K).indices
    assert torch.equal(by_expert(experts), by_expert(expected))


class Layer(nn.Module):
    """A layer that ranks logits by itself, as one whose softmax comes after top-k."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        values, _ = self.gate(x).topk(TOP_K, dim=-1)
        return values.softmax(dim=-1).sum()


@pytest.mark.parametrize("limit", [None, GroupLimit(4, 1)], ids=str)
@pytest.mark.parametrize("method", [mb.PhiBalancing(), mb.LossFree()], ids=["phi", "loss-free"])
def test_a_named_router_is_counted_by_its_logits(method, limit):
    model = nn.Sequential(Layer())
    how: dict[str, Any] = {"top_k": TOP_K, "gate": mb.Sigmoid(), "num_experts": EXPERTS}
    balancing = mb.attach(model, method, routers="*.gate", limit=limit, **how)
    logits = logits_of(mb.Sigmoid())
    model(logits.clone().requires_grad_()).backward()
    balancing.step()
    open_ = logits if limit is None else limit.within(logits)
    expected = torch.bincount(open_.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
    layer = next(iter(balancing.layers.values()))
    assert torch.equal(layer.last_sums.counts, expected.float())


# --- the fused kernels ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, GroupLimit(4, 2)], ids=str)
@pytest.mark.parametrize("price", [None, 0.0, 0.01])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_the_fused_router_ranks_equals_alike(gate, price, limit, interpreted):
    logits = logits_of(gate)[:40]
    if price is not None:
        price = torch.where(torch.arange(EXPERTS) % 3 == 0, price, -price)
    how = {"normalize": True, "price": price, "limit": limit}
    found = interpreted(choose, logits, gate, TOP_K, **how)
    wanted = plain.choose(logits, gate, TOP_K, **how)
    assert torch.equal(found.experts, wanted.experts)
