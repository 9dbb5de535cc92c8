"""A saved state from elsewhere may hold anything: what cannot be trained with is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from cases import METHODS, plain_top_k
from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance
from moebalance.core.state import check_values
from moebalance.methods import LossFree, PhiBalancing, Together
from moebalance.routing import measure

BOTH = Together(PhiBalancing(strength=0.1, rate=0.5), LossFree())


def handle(method=BOTH, experts=8) -> Balancing:
    return Balancing(method, {"a": LayerBalance(method, experts, name="a")})


def trained(method=BOTH) -> Balancing:
    balancing = handle(method)
    layer = balancing.layers["a"]
    routing = plain_top_k(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), 2)
    layer.count(measure(routing, method.extra(layer.state, routing)))
    balancing.step()
    return balancing


def spoilt(value=None, change=None):
    state = trained().state_dict()
    tensors = state["layers"]["a"]
    for key in tensors:
        tensors[key] = change(tensors[key]) if change else torch.full_like(tensors[key], value)
    return state


TENSORS = {
    "NaN": lambda: spoilt(float("nan")),
    "infinite": lambda: spoilt(float("inf")),
    "huge": lambda: spoilt(1e38),
    "minus huge": lambda: spoilt(-1e38),
    "complex": lambda: spoilt(change=lambda t: t.to(torch.complex64)),
    "boolean": lambda: spoilt(change=lambda t: t > 0),
    "whole numbers": lambda: spoilt(change=lambda t: t.long()),
    "bfloat16": lambda: spoilt(change=lambda t: t.bfloat16()),
    "float64": lambda: spoilt(change=lambda t: t.double()),
    "sparse": lambda: spoilt(change=lambda t: t.reshape(-1).to_sparse()),
    "without values": lambda: spoilt(change=lambda t: t.to("meta")),
    "a list": lambda: spoilt(change=lambda t: t.tolist()),
    "a price no affinity matters under": lambda: spoilt(1e9),
}
STEPS = [-5, "x", 1.0, True, None, 2**70, float("nan"), [1], 10**5000]


@pytest.mark.parametrize("case", TENSORS)
def test_a_state_that_cannot_be_trained_with_is_refused_and_nothing_changes(case):
    balancing = trained()
    before = copy.deepcopy(balancing.state_dict())
    with pytest.raises(ValueError, match=r"refused: |does not fit"):
        balancing.load_state_dict(TENSORS[case]())
    after = balancing.state_dict()["layers"]["a"]
    assert all(torch.equal(after[key], t) for key, t in before["layers"]["a"].items())


@pytest.mark.parametrize("steps", STEPS, ids=range(len(STEPS)))
def test_steps_that_are_no_whole_number_from_zero_on_are_refused(steps):
    with pytest.raises(ValueError, match=r"steps=.*whole number"):
        handle().load_state_dict({**trained().state_dict(), "steps": steps})


@pytest.mark.parametrize("state", [None, [], "x", 3, {1: 2}], ids=repr)
def test_what_is_no_state_at_all_is_refused_in_words(state):
    with pytest.raises(ValueError, match="Not a balancing state"):
        check_values(state)


@pytest.mark.parametrize("layers", [[], "x", {"a": 3}, {"a": [1]}, {3: {}}], ids=repr)
def test_layers_of_another_kind_are_refused_in_words(layers):
    with pytest.raises(ValueError, match=r"refused|another model"):
        handle().load_state_dict({**trained().state_dict(), "layers": layers})


@pytest.mark.parametrize("case", ["NaN", "infinite", "huge", "complex", "boolean", "bfloat16"])
def test_a_models_own_checkpoint_with_such_a_state_is_refused_too(case):
    tensors = TENSORS[case]()["layers"]["a"]
    with pytest.raises(RuntimeError, match="is refused"):
        handle().layers["a"].load_state_dict(tensors)


def test_the_parents_of_experts_do_not_let_a_sick_state_in():
    for case in ("NaN", "huge", "infinite"):
        with pytest.raises(ValueError, match="refused"):
            handle(experts=9).load_state_dict(TENSORS[case](), parents=[*range(8), 0])


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_saved_itself_is_taken_up(name):
    method = METHODS[name]
    new = handle(method)
    new.load_state_dict(trained(method).state_dict())
    assert new.steps == 1
