"""Forced routing: loads as announced, under any router, with the router's own weights."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

import moebalance as mb
from families import tiny
from moebalance.methods.forced import Forced

EXPERTS, TOP_K, TOKENS = 8, 2, 4096


def step(method: Forced, *, mask: torch.Tensor | None = None) -> tuple[mb.Balancing, torch.Tensor]:
    """One step of a router whose own choice would be expert 7 for all; the handle and gradient."""
    router = mb.BalancedRouter(method, EXPERTS, TOP_K)
    balancing = mb.attach(router)
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    logits = (logits + torch.arange(EXPERTS)).requires_grad_()
    weights, experts = router(logits, mask)
    expected = logits.softmax(-1).gather(-1, experts)
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))
    weights[:, 0].sum().backward()
    balancing.step()
    return balancing, logits.grad


def test_balanced_routing_has_no_violation_and_leaves_the_weights_their_gradient():
    balancing, gradient = step(Forced("balanced"))
    assert balancing.metrics()["maxvio"] == 0
    assert gradient.abs().max() > 1e-3


def test_padding_leaves_no_hole_in_the_balance():
    mask = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)) < 0.5
    balancing, _ = step(Forced("balanced"), mask=mask)
    (layer,) = balancing.layers.values()
    assert layer.last_sums.tokens == mask.sum()
    assert layer.last_sums.counts.max() - layer.last_sums.counts.min() <= TOP_K


@pytest.mark.parametrize("hot", [0.0, 0.25, 0.5, 1.0])
def test_skewed_routing_has_the_violation_that_it_announces(hot):
    balancing, _ = step(Forced("skewed", hot=hot))
    (load, _), *_ = balancing.loads().values()
    assert load.argmax() == 0
    expected = hot * (EXPERTS / TOP_K - 1)
    assert balancing.metrics()["maxvio"] == pytest.approx(expected, abs=0.01)


def test_random_routing_is_uniform_up_to_chance():
    balancing, _ = step(Forced("random"))
    (load, _), *_ = balancing.loads().values()
    deviation = (TOP_K / EXPERTS * (1 - TOP_K / EXPERTS) / TOKENS) ** 0.5 / TOP_K
    excess = (load - 1 / EXPERTS).abs() / deviation
    assert 0.3 < excess.max() < 4
    router = mb.BalancedRouter(Forced("random"), EXPERTS, TOP_K).eval()
    _, experts = router(torch.randn(TOKENS, EXPERTS))
    pairs = torch.bincount(experts[:, 0] * EXPERTS + experts[:, 1], minlength=EXPERTS**2)
    assert (pairs.view(EXPERTS, EXPERTS).diagonal() == 0).all()
    both_ways = (pairs.view(EXPERTS, EXPERTS) + pairs.view(EXPERTS, EXPERTS).T).triu(1)
    assert both_ways[both_ways > 0].numel() == EXPERTS * (EXPERTS - 1) / 2


@pytest.mark.parametrize("pattern", ["balanced", "random", "skewed"])
def test_a_recomputed_choice_is_the_same(pattern):
    router = mb.BalancedRouter(Forced(pattern), EXPERTS, TOP_K)
    seen = []

    def block(logits):
        weights, experts = router(logits)
        seen.append(experts)
        return weights.square().sum()

    logits = torch.randn(64, EXPERTS, requires_grad=True)
    checkpoint(block, logits, use_reentrant=False, preserve_rng_state=False).backward()
    first, second = seen
    assert torch.equal(first, second)
    assert router.running[2 * EXPERTS] == 64


def test_a_transformers_model_is_forced_and_its_methods_state_waits():
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    ids = torch.arange(32).view(1, 32)
    balancing = mb.attach(model, mb.LossFree())
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    saved = balancing.state_dict()
    balancing.detach()
    with mb.attach(model, Forced("balanced")) as forced:
        model(input_ids=ids, labels=ids).loss.backward()
        forced.step()
        assert forced.metrics()["maxvio"] == 0
    again = mb.attach(model, mb.LossFree())
    again.load_state_dict(saved)
    for name, layer in again.layers.items():
        assert torch.equal(layer.price, saved["layers"][name]["state_price"])


def test_patterns_and_parts_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="'balanced', 'random', 'skewed'"):
        Forced("even")
    with pytest.raises(ValueError, match=r"hot=1\.5"):
        Forced("skewed", hot=1.5)


@dataclass(frozen=True, repr=False)
class Reversed(mb.LossFree):
    """Ranks by itself, although it has a price."""

    def preference(self, state, gate, logits, *, mask, training):
        return -super().preference(state, gate, logits, mask=mask, training=training)


@dataclass(frozen=True, init=False)
class Upended(mb.Together):
    """A wrapper that ranks by itself what it wraps."""

    def preference(self, state, gate, logits, *, mask, training):
        return -super().preference(state, gate, logits, mask=mask, training=training)


WRAPS = {
    "alone": Reversed,
    "together": lambda **how: mb.Together(mb.PhiBalancing(), Reversed(**how)),
    "scheduled": lambda **how: mb.Scheduled(Reversed(**how), warmup_tokens=5),
    "a wrapper's own": lambda **how: Upended(mb.PhiBalancing(), mb.LossFree(**how)),
    "a wrapper's own, within": lambda **how: mb.Together(Upended(mb.LossFree(**how))),
}


@pytest.mark.parametrize("scale", ["affinity", "nats"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_methods_own_preference_is_ranked_although_it_has_a_price(scale, wrap, training):
    router = mb.BalancedRouter(wrap(scale=scale), 8, 2).train(training)
    logits = torch.randn(20, 8, requires_grad=True)
    _, experts = router(logits)
    worst = logits.topk(2, largest=False).indices
    assert torch.equal(experts.sort().values, worst.sort().values)
    model = tiny("qwen3_moe").train(training)
    with mb.attach(model, wrap(scale=scale)) as balancing:
        logits, _, experts = model.get_submodule(next(iter(balancing.layers)))(torch.randn(20, 32))
    worst = logits.topk(2, largest=False).indices
    assert torch.equal(experts.sort().values, worst.sort().values)
