"""A strength that follows a schedule in tokens: its shape, its laws, its words."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moebalance as mb
from cases import one_batch, random_routing, skewed_state
from moebalance import Scheduled
from moebalance.methods import observe
from moebalance.routing import Sums
from moebalance.words.methods import build_method

LOAD = torch.tensor([0.4, 0.3, 0.2, 0.1])
METHOD = Scheduled(
    mb.PhiBalancing(strength=0.02),
    warmup_tokens=1000,
    relax_after=5000,
    relax_tokens=2000,
    floor=0.25,
)


def sums(tokens: float) -> Sums:
    return Sums(LOAD * tokens, LOAD * tokens * 2, torch.tensor(tokens))


def after(method: Scheduled, steps: list[float]):
    state = method.init(4)
    for tokens in steps:
        state = method.update(state, sums(tokens))
    return state


@pytest.mark.parametrize(
    ("tokens", "share"),
    [(0, 0), (250, 0.25), (1000, 1), (5000, 1), (6000, 0.625), (7000, 0.25), (1e9, 0.25)],
)
def test_the_strength_rises_stays_and_falls_as_written(tokens, share):
    assert METHOD.factor(torch.tensor(float(tokens))).item() == pytest.approx(share)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(parts=st.lists(st.integers(0, 3000), min_size=1, max_size=12))
def test_the_strength_depends_on_the_tokens_and_not_on_how_steps_cut_them(parts):
    whole, cut = after(METHOD, [float(sum(parts))]), after(METHOD, [float(n) for n in parts])
    assert METHOD.multiplier(whole) == METHOD.multiplier(cut)


def test_at_full_strength_it_is_the_method_itself():
    plain = mb.PhiBalancing(strength=0.02)
    method = Scheduled(plain, warmup_tokens=50, relax_after=1e6)
    state, routing = skewed_state(method, 8), random_routing(24, 8, seed=4)
    batch = one_batch(method, state, routing)
    alone = skewed_state(plain, 8)
    torch.testing.assert_close(state.inner, alone, rtol=0, atol=0)
    expected = plain.penalty_gradient(alone, batch)
    assert torch.equal(method.penalty_gradient(state, batch), expected)
    assert method.traits.coupling == plain.traits.coupling
    assert method.traits.shared == plain.traits.shared


def test_the_method_learns_at_its_own_pace_whatever_is_charged():
    state = after(METHOD, [10.0] * 3)
    expected = METHOD.method.init(4)
    for _ in range(3):
        expected = METHOD.method.update(expected, sums(10.0))
    torch.testing.assert_close(state.inner, expected)
    batch = mb.routing.Batch(None, sums(10.0), sums(10.0))
    ratio = METHOD.loss_price(state, batch) / METHOD.method.loss_price(state.inner, batch)
    torch.testing.assert_close(ratio, torch.full((4,), 0.03))


def test_a_step_without_tokens_moves_no_schedule():
    state = after(METHOD, [300.0])
    assert METHOD.update(state, sums(0.0)).tokens == state.tokens == 300


def test_relaxing_at_once_is_a_step():
    method = Scheduled(mb.SwitchLoss(), relax_after=100)
    shares = [method.factor(torch.tensor(n)).item() for n in (99.0, 100.0, 101.0)]
    assert shares == [1, 1, 0]


def test_one_schedule_a_layer_goes_on_where_it_was_saved():
    def router():
        torch.manual_seed(0)
        return mb.BalancedRouter(METHOD, num_experts=4, top_k=1)

    def train(handle, layer, steps: int) -> None:
        for _ in range(steps):
            logits = torch.randn(64, 4, requires_grad=True)
            layer(logits)[0].sum().backward()
            handle.step()

    layer = router()
    with mb.attach(layer) as balancing:
        train(balancing, layer, 5)
        saved = copy.deepcopy(balancing.state_dict())
        assert balancing.metrics()["multiplier"] == pytest.approx(0.32)
    again = router()
    with mb.attach(again) as balancing:
        balancing.load_state_dict(saved)
        train(balancing, again, 5)
        assert again.state.tokens == 640
        found = balancing.metrics()
        assert found["multiplier_least"] == found["multiplier_most"] == pytest.approx(0.64)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Scheduled(mb.Sinkhorn(), warmup_tokens=10), "no strength to steer"),
        (lambda: Scheduled(mb.recommended(), warmup_tokens=10), r"Together\(Scheduled\(…\), …\)"),
        (lambda: Scheduled(mb.PhiBalancing(), warmup_tokens=-1), "warmup_tokens=-1"),
        (lambda: Scheduled(mb.PhiBalancing(), relax_after=10, floor=2.0), r"floor=2\.0"),
        (lambda: Scheduled(mb.PhiBalancing(), floor=0.5), "give relax_after"),
        (lambda: Scheduled(mb.PhiBalancing(), warmup_tokens=9, relax_after=5), "after the warm-up"),
    ],
)
def test_what_cannot_work_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_schedule_in_words():
    method = build_method("phi(strength=0.1, schedule={'warmup_tokens': 20})+loss-free")
    assert method.methods[0] == Scheduled(mb.PhiBalancing(strength=0.1), warmup_tokens=20)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("phi(schedule={'warm_up': 1})", "Did you mean 'warmup_tokens'"),
        ("phi(schedule=20)", "must be a table"),
        ("phi(target=0.3, schedule={'warmup_tokens': 1})", "give one of them"),
        ("sinkhorn(schedule={'warmup_tokens': 1})", "no strength to steer"),
    ],
)
def test_a_misspelt_schedule_is_refused(words, says):
    with pytest.raises(ValueError, match=says):
        build_method(words)


SELECTING = [
    mb.LossFree(speed=0.02),
    mb.LossFree(scale="nats"),
    mb.SMEBU(speed=0.02),
    mb.QuantileBalancing(bins=64),
]


@pytest.mark.parametrize("method", SELECTING, ids=repr)
def test_a_scheduled_price_is_ranked_as_a_price_by_the_kernels_too(method):
    assert mb.BalancedRouter(Scheduled(method, warmup_tokens=100), 8, 2).has_price


@pytest.mark.parametrize("method", SELECTING, ids=repr)
def test_a_selection_price_warms_up_and_freezes(method):
    slow = Scheduled(method, warmup_tokens=100, relax_after=200)
    state = slow.init(8)
    batch = random_routing(50, 8, seed=4)
    first = slow.update(state, observe(slow, state, batch))
    assert torch.equal(first.inner.price, torch.zeros(8))  # at no token seen, no speed
    second = slow.update(first, observe(slow, first, batch))
    full = method.update(first.inner, observe(slow, first, batch))
    torch.testing.assert_close(second.inner.price, 0.5 * full.price)
    late = second._replace(tokens=torch.tensor(200.5))
    frozen = slow.update(late, observe(slow, late, batch))
    assert torch.equal(frozen.inner.price, second.inner.price)
    assert frozen.inner.price.abs().max() > 0


@pytest.mark.parametrize("method", SELECTING, ids=repr)
def test_a_scheduled_selection_price_acts_as_the_method_does(method):
    slow = Scheduled(method, warmup_tokens=0)
    state, alone = skewed_state(slow, 8), skewed_state(method, 8)
    torch.testing.assert_close(state.inner.price, alone.price)
    logits = random_routing(24, 8).logits
    for gate in (mb.Softmax(), mb.Sigmoid()):
        wanted = method.preference(alone, gate, logits, mask=None, training=True)
        found = slow.preference(state, gate, logits, mask=None, training=True)
        torch.testing.assert_close(found, wanted)
    assert slow.traits == method.traits
