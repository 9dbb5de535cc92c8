"""Laws of what the levers do, for every method that charges or selects."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import (
    METHODS,
    charging_parts,
    one_batch,
    plain_top_k,
    random_routing,
    skewed_state,
    tensors,
    to_double,
)
from laws import every_gate, every_method, few, preference, seeds
from moebalance.methods import observe
from moebalance.routing import route

selecting = pytest.mark.parametrize(
    "method",
    [pytest.param(b, id=name) for name, b in METHODS.items() if b.traits.has_selection_price],
)
charging = pytest.mark.parametrize(
    "method",
    [pytest.param(b, id=name) for name, b in METHODS.items() if b.traits.charges],
)


def rotations(base: torch.Tensor) -> torch.Tensor:
    """Every rotation of the rows of `base` (N, E): a batch in which all E experts are alike."""
    turns = range(base.shape[-1])
    return torch.cat([base.roll(turn, dims=-1) for turn in turns])


@selecting
@every_gate
@given(seed=seeds, expert=st.integers(0, 7), amount=st.floats(0, 1))
@few
def test_raising_the_price_of_one_expert_never_raises_its_load(method, gate, seed, expert, amount):
    """Exact for every token: its rank can only fall while all others' keys stay."""
    state = skewed_state(method, 8, gate=gate)
    routing = random_routing(64, 8, gate=gate, seed=seed)
    ranked = preference(method, state, routing)
    # What is ranked is the affinity minus the price, so a dearer expert is ranked so much lower.
    torch.testing.assert_close(
        ranked, gate.affinities(routing.logits) - method.selection_price(state)
    )
    dearer = ranked.clone()
    dearer[:, expert] -= amount
    assert (dearer.topk(2).indices == expert).sum() <= (ranked.topk(2).indices == expert).sum()


@selecting
@every_gate
def test_an_update_makes_the_busiest_expert_dearer_than_the_idlest(method, gate):
    state = method.init(8)
    routing = random_routing(256, 8, gate=gate, seed=11)
    sums = observe(method, state, routing)
    change = method.selection_price(method.update(state, sums)) - method.selection_price(state)
    assert change[sums.counts.argmax()] > change[sums.counts.argmin()]


@charging
@every_gate
def test_a_gradient_step_lowers_the_mean_score_of_the_one_busy_expert(method, gate):
    """One expert is busier than all others, who are alike.

    For arbitrary loads this is false of single experts: taking score from an expert with a large
    score may hand some to a dear one with a small score. With equal prices q for all others the
    term is E·(q + (q_busy − q)·p̄_busy), and a step down its gradient lowers p̄_busy.
    """
    others = rotations(torch.randn(6, 7, generator=torch.Generator().manual_seed(0)))
    logits = torch.cat([others.max(dim=-1, keepdim=True).values + 0.5, others], dim=-1)
    routing = plain_top_k(logits, 2, gate=gate)
    # Methods that do not peek charge what finished steps have shown.
    state = method.update(method.init(8), observe(method, method.init(8), routing))
    batch = one_batch(method, state, routing)
    step = method.penalty_gradient(state, batch)
    after = gate.scores(logits - 1e-2 * step / step.abs().max()).mean(dim=0)
    assert after[0] < batch.sums.soft_load[0]


@charging
@every_gate
def test_a_small_gradient_step_lowers_the_penalty_at_the_same_price(method, gate):
    state = to_double(skewed_state(method, 8, gate=gate))
    routing = random_routing(48, 8, gate=gate, dtype=torch.float64, seed=9)
    batch = one_batch(method, state, routing)
    gradient = method.penalty_gradient(state, batch)
    length = 1e-3 / gradient.abs().max()
    moved = route(routing.logits - length * gradient, routing.experts, gate)
    change = method.penalty(state, batch._replace(routing=moved)) - method.penalty(state, batch)
    assert change / (-length * gradient.square().sum()) == pytest.approx(1, rel=1e-2)


@charging
@every_gate
def test_a_batch_in_which_all_experts_are_alike_is_not_charged(method, gate):
    base = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    routing = plain_top_k(rotations(base), 2, gate=gate)
    for part in charging_parts(method):
        state = to_double(part.init(8))
        for _ in range(3):
            batch = one_batch(part, state, routing)
            assert part.penalty_gradient(state, batch).abs().max() < 1e-15
            state = part.update(state, batch.sums)


@every_method
def test_what_is_held_is_each_tensor_as_it_was_before_or_after(method):
    """So that a replayed step can be told from another by one choice for each tensor."""
    before = method.init(4)
    routing = random_routing(12, 4, 2, seed=0)
    after = method.update(before, observe(method, before, routing))
    trios = zip(*map(tensors, (method.held(before, after), before, after)), strict=True)
    assert all(held is old or held is new for held, old, new in trios)
    if method.traits.has_selection_price:
        old, price = (method.selection_price(x) for x in (before, method.held(before, after)))
        assert torch.equal(old, price)
