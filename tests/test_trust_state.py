"""A saved state from elsewhere may hold anything: what cannot be trained with is refused."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import moebalance as mb
from cases import METHODS, plain_top_k
from moebalance import Balancing, LossFree, MaxVio, PhiBalancing, Targeted, Together
from moebalance.core.layer import LayerBalance
from moebalance.core.state import check_values
from moebalance.integrations.huggingface import state_file
from moebalance.integrations.huggingface.resuming import resume
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


LIMITED = {
    "a mean load below 0": ("phi-hard", "state_mean", -1.0),
    "a mean load that adds up to 8": ("phi-hard", "state_mean", 1.0),
    "a weight above 1": ("phi-hard", "state_weight", 2.0),
    "a negative weight": ("phi-hard", "state_weight", -0.5),
    "a negative square": ("phi-adaptive-memory", "state_near_mean", -1.0),
    "a multiplier of 1e14": ("phi-targeted", "state_multiplier", 1e14),
    "a multiplier above λ": ("phi-targeted", "state_multiplier", 5.0),
    "a negative multiplier": ("phi-targeted", "state_multiplier", -1.0),
    "a λ of 1e14": ("phi-targeted", "state_log_dual", 32.0),
    "a λ of 1e-14": ("phi-targeted", "state_log_dual", -32.0),
    "an endless recent v": ("phi-targeted", "state_lately", 1e14),
    "a goal's load below 0": ("phi-targeted", "state_load_mean", -1.0),
    "fewer than 0 tokens": ("phi-warmed-up", "state_tokens", -5.0),
    "a price in nats": ("loss-free-nats", "state_price", 1e14),
    "a price in affinities": ("loss-free", "state_price", 1e14),
    "a momentum": ("smebu", "state_momentum", 1e14),
    "a part of a composition": ("phi-and-loss-free", "state_0_mean", -1.0),
    "an inner price": ("loss-free-scheduled", "state_inner_price", -1e14),
    "fewer than 0 tokens in the last step": ("phi-hard", "last_step", -3.0),
}


@pytest.mark.survives(
    "Damaged and foreign states",
    "A saved load below 0, a multiplier above its λ, fewer than 0 tokens",
    "refused: with layer, tensor and limit",
)
@pytest.mark.parametrize("case", LIMITED)
def test_a_value_that_no_training_leaves_behind_is_refused(case):
    name, key, value = LIMITED[case]
    state = trained(METHODS[name]).state_dict()
    state["layers"]["a"][key].fill_(value)
    with pytest.raises(ValueError, match="refused: "):
        handle(METHODS[name]).load_state_dict(state)
    with pytest.raises(RuntimeError, match="is refused"):
        handle(METHODS[name]).layers["a"].load_state_dict(state["layers"]["a"])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [1e14, -1e14])
def test_no_tensor_of_any_method_loads_with_a_value_beyond_all_training(name, value):
    saved = trained(METHODS[name]).state_dict()
    for key in set(saved["layers"]["a"]) - {"last_step"}:
        state = copy.deepcopy(saved)
        state["layers"]["a"][key].fill_(value)
        if key.endswith("tokens") and value > 0:
            continue  # so many tokens can be seen
        if key.endswith(("near_mean", "far_mean")) and value > 0:
            continue  # a square has no bound of its own
        with pytest.raises(ValueError, match="refused: "):
            handle(METHODS[name]).load_state_dict(state)


def test_a_multiplier_above_a_ceiling_that_was_lowered_comes_down_with_the_next_step():
    high = Targeted(PhiBalancing(strength=0.1), MaxVio(0.3), ceiling=30.0)
    state = trained(high).state_dict()
    state["layers"]["a"]["state_log_dual"].fill_(3.0)
    state["layers"]["a"]["state_multiplier"].fill_(20.0)
    low = handle(Targeted(PhiBalancing(strength=0.1), MaxVio(0.3), ceiling=2.0))
    low.load_state_dict(state)
    routing = plain_top_k(torch.randn(16, 8), 2)
    low.layers["a"].count(measure(routing))
    low.step()
    assert low.layers["a"].state.multiplier.item() <= 2.0 + 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_a_long_run_of_lopsided_batches_leaves_a_state_that_loads(name):
    method = METHODS[name]
    balancing = handle(method)
    layer = balancing.layers["a"]
    logits = torch.zeros(16, 8)
    logits[:, 0] = 30.0
    for _ in range(60):
        routing = plain_top_k(logits, 2)
        layer.count(measure(routing, method.extra(layer.state, routing)))
        balancing.step()
    new = handle(method)
    new.load_state_dict(balancing.state_dict())
    assert new.steps == 60


@pytest.mark.parametrize("change", [{"steps": "x"}, {"steps": None}, {"method": 3}])
def test_a_trainer_refuses_such_a_state_before_it_asks_of_which_step_it_is(tmp_path, change):
    folder = tmp_path / "checkpoint-1"
    state_file.save(trained(), folder)
    described = json.dumps({**state_file.read(folder), "layers": None, **change})
    tensors = load_file(folder / mb.huggingface.STATE_FILE)
    save_file(tensors, folder / mb.huggingface.STATE_FILE, metadata={"moebalance": described})
    args = SimpleNamespace(output_dir=str(tmp_path), resume_from_checkpoint=None)
    with pytest.raises(ValueError, match="refused"):
        resume(handle(), args, SimpleNamespace(global_step=1), given=None, state_file=True)


@pytest.mark.survives(
    "Damaged and foreign states",
    "A model's own selection bias is NaN, infinite or huge",
    "refused: with the layer",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e14, -1e14])
def test_a_models_own_selection_bias_that_no_choice_can_be_made_under_is_refused(value):
    layer = handle(LossFree()).layers["a"]
    with pytest.raises(ValueError, match=r"selection bias of a is refused: it (has|goes)"):
        layer.adopt(torch.full((8,), value))
    assert not layer.price.any()
