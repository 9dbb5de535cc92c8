"""Experts copied, merged, added and taken out: what becomes of the balancing state."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import GATES, METHODS, plain_top_k, random_logits, skewed_state, tensors
from families import loss, tiny, tokens
from moebalance import (
    SMEBU,
    Balancing,
    LossFree,
    PhiBalancing,
    QuantileBalancing,
    Softmax,
    SwitchLoss,
    Together,
    attach,
    huggingface,
)
from moebalance.core.layer import LayerBalance
from moebalance.methods import observe
from moebalance.methods.ema import Ema
from moebalance.methods.lineage import Lineage, inherit

TWICE = [0, 1, 2, 3, 4, 5, 6, 7] * 2
BACK = [(e, e + 8) for e in range(8)]
few = settings(max_examples=20, deadline=None, derandomize=True)
masses = st.lists(st.floats(0.01, 1), min_size=2, max_size=9)


def proportions(numbers) -> torch.Tensor:
    values = torch.tensor(numbers)
    return values / values.sum()


# --- the law of descent -------------------------------------------------------------------------


@given(masses)
@few
def test_the_identity_changes_no_bit(numbers):
    old = proportions(numbers)
    lineage = Lineage.of(range(len(old)), len(old))
    assert torch.equal(lineage.mass(old), old)
    assert torch.equal(lineage.price(old), old)


@given(masses, st.data())
@few
def test_mass_is_kept_whatever_the_descent(numbers, data):
    old = proportions(numbers)
    some = st.lists(st.integers(0, len(old) - 1), max_size=3)
    parents = data.draw(st.lists(some, min_size=2, max_size=12))
    new = Lineage.of(parents, len(old)).mass(old)
    assert new.sum().item() == pytest.approx(old.sum().item(), rel=1e-6)
    assert (new >= 0).all()


@given(masses, st.data())
@few
def test_merging_the_copies_gives_back_what_there_was(numbers, data):
    old = proportions(numbers)
    extra = data.draw(st.lists(st.integers(0, len(old) - 1), max_size=9))
    parents = [*range(len(old)), *extra]
    grown = Lineage.of(parents, len(old))
    back = [[j for j, parent in enumerate(parents) if parent == e] for e in range(len(old))]
    shrunk = Lineage.of(back, len(parents))
    torch.testing.assert_close(shrunk.mass(grown.mass(old)), old, rtol=1e-6, atol=0)
    torch.testing.assert_close(shrunk.price(grown.price(old)), old, rtol=1e-6, atol=0)


def test_copies_share_their_parents_mass_and_have_its_price():
    old = torch.tensor([0.5, 0.25, 0.25])
    lineage = Lineage.of([0, 1, 2, 0, 0], 3)
    torch.testing.assert_close(lineage.mass(old), torch.tensor([1 / 6, 0.25, 0.25, 1 / 6, 1 / 6]))
    assert lineage.price(old).tolist() == [0.5, 0.25, 0.25, 0.5, 0.5]


def test_what_a_lost_expert_had_goes_to_the_others_in_proportion():
    lineage = Lineage.of([0, 2], 3)
    assert lineage.mass(torch.tensor([0.5, 0.375, 0.125])).tolist() == pytest.approx([0.8, 0.2])
    assert lineage.mass(torch.tensor([0.0, 1.0, 0.0])).tolist() == [0.5, 0.5]


def test_a_new_expert_starts_with_an_even_part_and_the_mean_price():
    old = torch.tensor([0.5, 0.3, 0.2])
    lineage = Lineage.of([0, 1, 2, ()], 3)
    assert lineage.mass(old).tolist() == pytest.approx([0.375, 0.225, 0.15, 0.25])
    assert lineage.price(old)[3].item() == pytest.approx(1 / 3)


def test_an_average_that_has_seen_nothing_stays_empty():
    grown = Ema.empty(3).inherit(Lineage.of([0, 1, 2, 0], 3), Softmax())
    assert grown.mean.tolist() == [0.25] * 4
    assert torch.equal(grown.weight, Ema.empty(3).weight)


class Table(NamedTuple):
    rows: torch.Tensor


def test_a_state_that_does_not_say_how_it_follows_is_refused():
    with pytest.raises(TypeError, match=r"method inherit\(lineage, gate\)"):
        inherit(Table(torch.ones(8)), Lineage.of(TWICE, 8), Softmax())


# --- every method -------------------------------------------------------------------------------


def keeps_a_price(method) -> bool:
    return method.traits.selects and bool(tensors(method.init(8)))


# A selection price keeps its step, whatever the number of experts: it would have gone another way.
AVERAGING = {name: method for name, method in METHODS.items() if not keeps_a_price(method)}


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("gate", GATES)
def test_the_state_of_a_copied_layer_is_the_one_it_would_have_had_from_the_start(name, gate):
    """Router rows copied and K doubled: all scores halve, and both copies of an expert serve."""
    method, gate = AVERAGING[name], GATES[gate]
    small, large = method.init(8), method.init(16)
    for seed in range(4):
        logits = random_logits(48, 8, seed=seed)
        for state, z, k in ((small, logits, 2), (large, logits.repeat(1, 2), 4)):
            routing = plain_top_k(z, k, gate=gate)
            after = method.update(state, observe(method, state, routing))
            small, large = (after, large) if state is small else (small, after)
    found = inherit(small, Lineage.of(TWICE, 8), gate)
    for mine, theirs in zip(tensors(found), tensors(large), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "method",
    [
        LossFree(speed=0.05),
        LossFree(scale="nats", speed=0.3),
        QuantileBalancing(),
        QuantileBalancing(scale="nats"),
        SMEBU(speed=0.2),
    ],
    ids=["loss-free", "loss-free in nats", "quantile", "quantile in nats", "smebu"],
)
def test_tokens_go_to_the_copies_of_the_experts_that_they_went_to(method, gate):
    gate = GATES[gate]
    state = skewed_state(method, 8, gate=gate)
    logits = random_logits(64, 8, seed=9)
    grown = inherit(state, Lineage.of(TWICE, 8), gate)

    def choice(held: Any, z: torch.Tensor, k: int) -> torch.Tensor:
        ranked = method.preference(held, gate, z, mask=None, training=True)
        served = torch.zeros_like(z)
        return served.scatter(-1, ranked.topk(k).indices, 1.0)

    before = choice(state, logits, 2)
    assert torch.equal(choice(grown, logits.repeat(1, 2), 4), before.repeat(1, 2))
    assert not torch.equal(before, choice(method.init(8), logits, 2))


def layer_of(method, experts: int, steps: int) -> Balancing:
    layer = LayerBalance(method, experts, name="a")
    handle = Balancing(method, {"a": layer})
    for seed in range(steps):
        routing = plain_top_k(random_logits(32, experts, seed=seed), 2)
        layer.count(observe(method, layer.state, routing))
        handle.step()
    return handle


@pytest.mark.parametrize("name", METHODS)
def test_every_method_grows_and_shrinks_back(name):
    method = METHODS[name]
    saved = layer_of(method, 8, 3).state_dict()
    same, grown, back = (layer_of(method, experts, 0) for experts in (8, 16, 8))
    same.load_state_dict(saved, parents=range(8))
    grown.load_state_dict(saved, parents=TWICE)
    back.load_state_dict(grown.state_dict(), parents=BACK)
    assert same.steps == grown.steps == back.steps == 3
    for key, tensor in saved["layers"]["a"].items():
        assert torch.equal(same.state_dict()["layers"]["a"][key], tensor)
        assert torch.equal(back.state_dict()["layers"]["a"][key], tensor)
    price = grown.layers["a"].price
    assert price is None or torch.equal(price[:8], price[8:])
    routing = plain_top_k(random_logits(32, 16), 2)
    grown.layers["a"].count(observe(method, grown.layers["a"].state, routing))
    grown.step()


@pytest.mark.parametrize(
    ("parents", "says"),
    [
        (None, r"say of which each descends: parents=\[…\]"),
        ([0, 1], "parents has 2 entries, but a has 16 experts"),
        ([*TWICE[:-1], 8], r"experts \[8\], but the layer had 8: number them 0 … 7"),
    ],
)
def test_a_descent_that_does_not_fit_is_refused_whole(parents, says):
    method = Together(PhiBalancing(), LossFree())
    saved, grown = layer_of(method, 8, 2).state_dict(), layer_of(method, 16, 1)
    before = grown.state_dict()
    with pytest.raises(ValueError, match=says):
        grown.load_state_dict(saved, parents=parents)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            before["layers"]["a"].values(), grown.state_dict()["layers"]["a"].values(), strict=True
        )
    )


def test_a_method_without_memory_has_nothing_to_inherit():
    grown = layer_of(SwitchLoss(), 16, 0)
    grown.load_state_dict(layer_of(SwitchLoss(), 8, 2).state_dict(), parents=TWICE)
    assert grown.steps == 2


# --- a model ------------------------------------------------------------------------------------


def train(model, handle: Balancing, steps: int = 2) -> None:
    for seed in range(steps):
        loss(model, tokens(seed=seed)).backward()
        handle.step()
    model.zero_grad()


@torch.no_grad()
def copy_experts(old, new, parents: list[int]) -> None:
    """Weights of a model whose experts are these of the old one."""
    theirs = old.state_dict()
    for key, tensor in new.state_dict().items():
        follows = tensor.shape != theirs[key].shape
        tensor.copy_(theirs[key][parents] if follows else theirs[key])


def test_a_model_is_upcycled_and_pruned_in_mid_training(tmp_path):
    method = Together(PhiBalancing(strength=0.01), LossFree(speed=0.01))
    old = tiny("mixtral")
    before = attach(old, method)
    train(old, before)
    huggingface.save(before, tmp_path / "old")

    large = tiny("mixtral", num_local_experts=16, num_experts_per_tok=4)
    copy_experts(old, large, TWICE)
    grown = attach(large, method)
    huggingface.load(grown, tmp_path / "old", parents=TWICE)
    for name, layer in before.layers.items():
        mean = grown.layers[name].state[0].mean
        torch.testing.assert_close(mean, layer.state[0].mean.repeat(2) / 2)
        assert mean.sum().item() == pytest.approx(1)

    # The very next load is fair: copies get the same, and the state had foreseen how much.
    for model, handle in ((old, before), (large, grown)):
        loss(model, tokens(seed=7)).backward()
        handle.step()
    for (hard, soft), (hard_large, soft_large) in zip(
        before.loads().values(), grown.loads().values(), strict=True
    ):
        torch.testing.assert_close(hard_large, hard.repeat(2) / 2)
        torch.testing.assert_close(soft_large, soft.repeat(2) / 2, rtol=1e-4, atol=1e-6)

    kept = [0, 1, 2, 4, 5, 6, 7, 15]
    small = tiny("mixtral")
    copy_experts(large, small, kept)
    pruned = attach(small, method)
    pruned.load_state_dict(grown.state_dict(), parents=kept)
    for name, layer in pruned.layers.items():
        mean = grown.layers[name].state[0].mean[kept]
        torch.testing.assert_close(layer.state[0].mean, mean / mean.sum())
    train(small, pruned)


# --- what the load is counted of ----------------------------------------------------------------


def test_shared_experts_are_not_routed_and_not_counted():
    model = tiny("qwen2_moe")
    handle = attach(model, PhiBalancing())
    ids = tokens()
    loss(model, ids).backward()
    for layer in handle.layers.values():
        assert layer.num_experts == 8
        assert layer.running[8:16].sum() == 2 * ids.numel()


@pytest.mark.parametrize("capacity", [1, 64])
def test_choices_are_counted_before_tokens_are_dropped_for_capacity(capacity):
    """What a full expert turns away is demand all the same; counted after, all would look even."""
    model = tiny("switch_transformers", expert_capacity=capacity)
    handle = attach(model, PhiBalancing())
    routers = [m for m in model.modules() if type(m).__name__ == "SwitchTransformersTop1Router"]
    dropped, wanted = [], []

    def see(router, args, output):
        dispatched, _, logits = output
        kept = dispatched.sum().item()
        dropped.append(logits.shape[:-1].numel() - kept)
        chosen = logits.reshape(-1, 8).argmax(-1)
        wanted.append(torch.bincount(chosen, minlength=8).float())

    for router in routers:
        router.register_forward_hook(see)
    loss(model, tokens(batch=4)).backward()
    assert (sum(dropped) > 0) == (capacity == 1)
    for layer, counts in zip(handle.layers.values(), wanted, strict=True):
        assert torch.equal(layer.running[8:16], counts)
