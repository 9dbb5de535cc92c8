"""A memory in tokens means the same however the tokens are cut into steps."""

from __future__ import annotations

import math

import pytest
import torch

from cases import random_logits, to_double
from moebalance import EmaSwitchLoss, Method, PhiBalancing, Softmax
from moebalance.methods.memory import batch_rate
from moebalance.routing import Batch, Sums, measure, route

EXPERTS, TOKENS, MEMORY = 6, 960, 300.0


def sums(load: torch.Tensor, tokens: float) -> Sums:
    return Sums(load * tokens, load * 2 * tokens, torch.tensor(tokens, dtype=torch.float64))


def remembered(method: Method, steps: int) -> torch.Tensor:
    """The mean after one stream of tokens, cut into so many steps; its load turns over half-way."""
    early = torch.linspace(1, 2, EXPERTS, dtype=torch.float64)
    early, late = early / early.sum(), early.flip(0) / early.sum()
    state = to_double(method.init(EXPERTS))
    for i in range(steps):
        load = early if i < steps // 2 else late
        state = method.update(state, sums(load, TOKENS / steps))
    return state.mean


@pytest.mark.parametrize("method", [PhiBalancing, EmaSwitchLoss])
def test_the_same_tokens_in_more_steps_leave_the_same_memory(method):
    expected = remembered(method(memory_tokens=MEMORY), 2)
    for steps in (4, 16, 96):
        found = remembered(method(memory_tokens=MEMORY), steps)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_with_a_rate_they_do_not():
    """The control."""
    few, many = (remembered(PhiBalancing(rate=0.3), steps) for steps in (2, 16))
    assert (few - many).abs().max() > 0.01


def test_a_step_of_n_tokens_has_the_rate_that_the_docstring_says():
    method = PhiBalancing(memory_tokens=MEMORY)
    load = torch.full((EXPERTS,), 1 / EXPERTS, dtype=torch.float64)
    state = method.update(to_double(method.init(EXPERTS)), sums(load, 120.0))
    assert state.weight.item() == pytest.approx(1 - math.exp(-120 / MEMORY), rel=1e-12)


def test_a_batch_peeks_by_its_own_tokens_and_needs_no_share_of_its_step():
    method = PhiBalancing(memory_tokens=MEMORY)
    logits = random_logits(40, EXPERTS, dtype=torch.float64)
    routing = route(logits, logits.topk(2).indices, Softmax())
    seen = measure(routing)
    empty = method.init(EXPERTS)
    rates = [batch_rate(method, empty, Batch(routing, seen, seen, share)) for share in (0.1, 1.0)]
    assert rates[0] == rates[1] == pytest.approx(1 - math.exp(-40 / MEMORY), rel=1e-12)


@pytest.mark.parametrize("method", [PhiBalancing, EmaSwitchLoss])
def test_a_rate_and_a_memory_at_once_are_refused(method):
    with pytest.raises(ValueError, match="give one of them"):
        method(rate=0.1, memory_tokens=MEMORY)


@pytest.mark.parametrize("memory", [0, -1.0, math.inf, math.nan])
def test_a_memory_that_is_no_positive_number_is_refused(memory):
    with pytest.raises(ValueError, match="memory_tokens"):
        PhiBalancing(memory_tokens=memory)


def test_a_method_shows_the_one_of_rate_and_memory_that_it_has():
    assert "memory_tokens=10000" in repr(PhiBalancing())
    assert "rate=" not in repr(PhiBalancing())
    assert "rate=0.1, load='soft', peek=True, unit=" in repr(PhiBalancing(rate=0.1))
    assert "rate=" not in repr(PhiBalancing(memory_tokens=MEMORY))
    assert repr(EmaSwitchLoss(memory_tokens=MEMORY)) == (
        f"EmaSwitchLoss(strength=0.01, memory_tokens={MEMORY})"
    )
