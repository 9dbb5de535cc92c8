"""What balancing adds to a router, in kernels and bytes: hard limits, the same on every machine."""

from __future__ import annotations

import pytest
import torch

from cases import commit
from moebalance import (
    BalancedRouter,
    EmaSwitchLoss,
    GlobalBatchLoss,
    LossFree,
    Method,
    NoBalancing,
    PhiBalancing,
    Sigmoid,
    Softmax,
    SwitchLoss,
    attach,
    recommended,
)
from moebalance.core.autograd import choose, tie
from moebalance.core.layer import LayerBalance
from moebalance.gates import Gate
from moebalance.lab.bench.traffic import Traffic, _Watch, kept_for_backward, traffic

TOKENS, EXPERTS, TOP_K = 4096, 256, 8

PRICED: dict[str, Method] = {
    "phi": PhiBalancing(),
    "phi-no-peek": PhiBalancing(peek=False),
    "switch": SwitchLoss(),
    "global-batch": GlobalBatchLoss(),
    "ema-switch": EmaSwitchLoss(),
    "none": NoBalancing(),
}

every_priced = pytest.mark.parametrize("name", PRICED)
every_rule = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])


def bare(logits: torch.Tensor, *, normalize: bool, gate: Gate | None = None) -> torch.Tensor:
    """A router without balancing, as the models in use write it."""
    affinities = logits.sigmoid() if isinstance(gate, Sigmoid) else logits.softmax(dim=-1)
    weights, _ = affinities.topk(TOP_K, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True) if normalize else weights


def leaf(experts: int = EXPERTS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, experts, generator=generator).requires_grad_()


def router(name: str, *, normalize: bool, gate: Gate | None = None) -> BalancedRouter:
    return BalancedRouter(PRICED[name], EXPERTS, TOP_K, gate=gate or Softmax(), normalize=normalize)


def watched(weigh, logits: torch.Tensor) -> Traffic:
    upstream = torch.ones(TOKENS, TOP_K)
    return traffic(lambda: torch.autograd.grad(weigh(logits), logits, upstream), rows=TOKENS)


def pair(name: str, *, normalize: bool, gate: Gate | None = None) -> tuple[Traffic, Traffic]:
    """Traffic of the balanced router and of the bare one."""
    logits, balanced = leaf(), router(name, normalize=normalize, gate=gate)
    return (
        watched(lambda z: balanced(z)[0], logits),
        watched(lambda z: bare(z, normalize=normalize, gate=gate), logits),
    )


@every_rule
@every_priced
def test_at_most_three_kernels_over_tokens_more_than_a_bare_router(name, normalize):
    """Two sums, and a look at the chosen affinities: do they still tell logits apart?"""
    balanced, plain = pair(name, normalize=normalize)
    assert len(balanced.large) <= len(plain.large) + 3, (balanced.large, plain.large)


SMALL = {"phi": 13, "phi-no-peek": 11, "switch": 9, "global-batch": 9, "ema-switch": 10, "none": 4}


@every_rule
@every_priced
def test_a_small_and_fixed_number_of_kernels_over_experts(name, normalize):
    balanced, _ = pair(name, normalize=normalize)
    assert len(balanced.small) <= SMALL[name], balanced.small


def test_other_steps_and_later_ones_take_no_more_kernels():
    """With a step of several batches behind it, which the share and the average then know of."""
    logits, balanced = leaf(), router("phi", normalize=False)
    for _ in range(2):
        for _ in range(3):
            watched(lambda z: balanced(z)[0], logits)
        commit(balanced)
    assert len(watched(lambda z: balanced(z)[0], logits).small) <= SMALL["phi"]


@every_rule
@every_priced
def test_one_read_of_the_scores_and_of_the_choice_more_than_a_bare_router(name, normalize):
    balanced, plain = pair(name, normalize=normalize)
    more = (balanced.bytes - plain.bytes) / (TOKENS * EXPERTS)
    assert more <= 4.4, (more, balanced.large, plain.large)


@every_rule
@every_priced
def test_nothing_more_is_kept_for_backward_than_by_a_bare_router(name, normalize):
    logits, balanced = leaf(), router(name, normalize=normalize)
    ours = kept_for_backward(lambda: balanced(logits)[0])
    assert ours == kept_for_backward(lambda: bare(logits, normalize=normalize))


@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=["softmax", "sigmoid"])
@every_priced
def test_nothing_is_read_back_to_the_host(name, gate):
    balanced, _ = pair(name, normalize=True, gate=gate)
    assert "aten::_local_scalar_dense" not in balanced.large + balanced.small
    assert "aten::nonzero" not in balanced.large + balanced.small


@every_priced
def test_a_sigmoid_router_adds_three_reads_of_the_scores(name):
    """Sums of rows, of columns, and what a row is worth at the price."""
    balanced, plain = pair(name, normalize=True, gate=Sigmoid())
    more = (balanced.bytes - plain.bytes) / (TOKENS * EXPERTS)
    assert more <= 12.9, (more, balanced.large, plain.large)
    assert len(balanced.large) <= len(plain.large) + 10, (balanced.large, plain.large)
    assert len(balanced.small) <= SMALL[name] + 2, balanced.small


ATTACHED = {
    ("softmax", "formed"): (Softmax(), 3, 12.3),
    ("sigmoid", "formed"): (Sigmoid(), 10, 20.6),
    ("softmax", "anew"): (Softmax(), 7, 32.6),
    ("sigmoid", "anew"): (Sigmoid(), 14, 48.9),
}
"""Kernels and bytes a score: where the router's own affinities are found, and where not."""


@pytest.mark.parametrize(("where", "limits"), ATTACHED.items(), ids=map("-".join, ATTACHED))
@pytest.mark.parametrize("name", [n for n, b in PRICED.items() if b.traits.charges])
def test_what_is_attached_to_another_router_forms_scores_only_where_it_must(name, where, limits):
    """Formed: their sums, and the charge onto their gradient. Anew: also scores, and a gradient."""
    gate, kernels, size = limits
    logits, layer = leaf(), LayerBalance(PRICED[name], EXPERTS, gate=gate)

    def attached(z):
        affinities = gate.affinities(z)
        weights, experts = affinities.topk(TOP_K, dim=-1)
        if where[1] == "formed":
            return layer.tie(weights, z, experts)
        return tie(weights, layer.pass_for(z, experts.shape[-1]), logits=z, experts=experts)

    balanced = watched(attached, logits)
    plain = watched(lambda z: bare(z, normalize=False, gate=gate), logits)
    more = (balanced.bytes - plain.bytes) / (TOKENS * EXPERTS)
    assert more <= size, (more, balanced.large, plain.large)
    assert len(balanced.large) <= len(plain.large) + kernels, (balanced.large, plain.large)


@pytest.mark.parametrize("name", [n for n, b in PRICED.items() if b.traits.charges])
def test_our_pass_in_place_of_a_routers_moves_eight_bytes_a_score_more_at_most(name):
    """As attached to a router of Transformers that is known whole; its choice is in its order."""
    logits, layer = leaf(), LayerBalance(PRICED[name], EXPERTS)

    def instead(z):
        return choose(z, layer.pass_for(z, TOP_K, normalize=True, ordered=True))[0]

    balanced = watched(instead, logits)
    plain = watched(lambda z: bare(z, normalize=True), logits)
    more = (balanced.bytes - plain.bytes) / (TOKENS * EXPERTS)
    assert more <= 8, (more, balanced.large, plain.large)
    assert len(balanced.large) <= len(plain.large) + 3, (balanced.large, plain.large)
    kept = [kept_for_backward(lambda run=run: run(logits)) for run in (instead, whole)]
    assert kept[0] <= kept[1]


def whole(z):
    return bare(z, normalize=True)


def kernels_of_a_step(method: Method, layers: int) -> list[str]:
    model = torch.nn.Sequential(*[BalancedRouter(method, 16, 2) for _ in range(layers)])
    balancing = attach(model)
    for watch in (_Watch(1), _Watch(1)):  # the first step agrees, and warms up
        for layer in model:
            layer(torch.randn(32, 16, requires_grad=True))[0].sum().backward()
        with watch:
            balancing.step()
    return watch.seen.small + watch.seen.large


@pytest.mark.parametrize(("method", "most"), [(PhiBalancing(), 25), (recommended(), 36)], ids=str)
def test_the_end_of_a_step_takes_as_many_kernels_for_many_layers_as_for_one(method, most):
    """Without other ranks: sums and their verdict, the update, and what is cleared."""
    one, many = kernels_of_a_step(method, 1), kernels_of_a_step(method, 16)
    assert sorted(one) == sorted(many)
    assert len(many) <= most, many


@pytest.mark.parametrize(("size", "logarithms"), [(1.0, 0), (30.0, 1)], ids=["mild", "saturated"])
def test_sigmoids_under_a_price_in_nats_form_no_logarithm_of_mild_scores(size, logarithms):
    router = BalancedRouter(LossFree(scale="nats"), EXPERTS, TOP_K, gate=Sigmoid())
    router.adopt(torch.randn(EXPERTS))
    logits = (size * torch.randn(TOKENS, EXPERTS).clamp(-2, 2)).requires_grad_()
    seen = watched(lambda z: router(z)[0], logits)
    assert sum("log_sigmoid" in kernel for kernel in seen.small + seen.large) == logarithms


def test_the_count_sees_what_a_second_pass_would_cost():
    """The control: a router that asks autograd for the penalty breaks every limit above."""

    def through_autograd(logits):
        scores = logits.softmax(dim=-1)
        weights, experts = scores.topk(TOP_K, dim=-1)
        load = torch.bincount(experts.flatten(), minlength=EXPERTS).float()
        return weights + (scores.mean(0) * load).sum()

    logits = leaf()
    plain = watched(lambda z: bare(z, normalize=False), logits)
    more = watched(through_autograd, logits)
    assert len(more.large) > len(plain.large) + 3
    assert more.bytes - plain.bytes > 4.3 * TOKENS * EXPERTS
