"""Shares of the load in methods, goals and metrics: equal ones change nothing, others are met."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moebalance as mb
from cases import OF_EIGHT, POTENTIALS, PROPORTIONS, one_batch, permute, random_routing, tensors
from moebalance import (
    BalancedRouter,
    EmaSwitchLoss,
    GlobalBatchLoss,
    LossFree,
    MaxVio,
    Method,
    NegativeEntropy,
    PhiBalancing,
    PlugInLoss,
    QuantileBalancing,
    SequenceLoss,
    Sinkhorn,
    SwitchLoss,
    Targeted,
    Together,
    attach,
    metrics,
)
from moebalance.methods import EntropyDeficit, Gini, RankVio
from moebalance.potentials import Relative
from moebalance.proportions import as_proportions, per_proportion
from moebalance.routing import route
from moebalance.words.methods import build_method

EQUAL = (3.0,) * 8
RHO = torch.tensor(PROPORTIONS, dtype=torch.float64) / sum(PROPORTIONS)

WITHOUT: dict[str, Method] = {
    "switch": SwitchLoss(strength=0.03),
    "global-batch": GlobalBatchLoss(strength=0.02),
    "sequence": SequenceLoss(strength=0.04),
    "ema-switch": EmaSwitchLoss(strength=0.03, rate=0.4),
    "loss-free": LossFree(),
    "loss-free-proportional": LossFree(speed=0.02, rule="proportional"),
    "quantile": QuantileBalancing(bins=64),
    "sinkhorn": Sinkhorn(),
    **{f"phi-{name}": PhiBalancing(p, strength=0.05) for name, p in POTENTIALS.items()},
    "plug-in": PlugInLoss(strength=0.03),
}


def with_shares(method: Method, proportions: Any) -> Method:
    if isinstance(method, PhiBalancing | PlugInLoss):
        return replace(method, potential=method.potential.relative_to(proportions))
    return replace(method, proportions=proportions)


def history(method: Method, seeds=range(4)) -> list[torch.Tensor]:
    """Everything that a method says over some steps."""
    state, said = method.init(8), []
    for seed in seeds:
        routing = random_routing(96, 8, seed=seed, sequences=4)
        batch = one_batch(method, state, routing)
        state = method.update(state, batch.sums)
        preferred = method.preference(state, routing.gate, routing.logits, mask=None, training=True)
        said += [method.penalty_gradient(state, batch), preferred, *tensors(state)]
    return [tensor for tensor in said if tensor is not None]


@pytest.mark.parametrize("name", WITHOUT)
def test_equal_shares_change_nothing(name):
    plain = history(WITHOUT[name])
    shared = history(with_shares(WITHOUT[name], EQUAL))
    assert plain
    for mine, theirs in zip(shared, plain, strict=True):
        scale = max(theirs.abs().max().item(), 1e-12)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("name", WITHOUT)
def test_only_the_proportions_matter(name):
    once, twice = (
        history(with_shares(WITHOUT[name], tuple(k * s for s in PROPORTIONS))) for k in (1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def renumbered(value: Any, order: list[int]) -> Any:
    """A method whose shares are those of renumbered experts."""
    if isinstance(value, tuple) and value and isinstance(value[0], mb.Method):
        return tuple(renumbered(part, order) for part in value)
    if not is_dataclass(value):
        return value
    changes = {
        f.name: tuple(value.proportions[e] for e in order)
        if f.name == "proportions" and value.proportions
        else renumbered(getattr(value, f.name), order)
        for f in fields(value)
        if f.name != "parts"
    }
    return mb.Together(*changes["methods"]) if "methods" in changes else replace(value, **changes)


@pytest.mark.parametrize("name", [name for name in OF_EIGHT if "groups" not in name])
@given(seed=st.integers(0, 1000))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_renumbering_experts_with_their_shares_renumbers_every_result(name, seed):
    method = OF_EIGHT[name]
    if name == "phi-levels":
        method = replace(method, potential=method.potential.parts[1])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    other = renumbered(method, order.tolist())
    routing = random_routing(36, 8, seed=seed, sequences=3)
    twin = route(
        routing.logits[:, order], order.argsort()[routing.experts], routing.gate, sequences=3
    )
    state = method.init(8)
    batch, twin_batch = one_batch(method, state, routing), one_batch(other, state, twin)
    after = method.update(state, batch.sums)
    for x, y in zip(
        tensors(permute(after, order)), tensors(other.update(state, twin_batch.sums)), strict=True
    ):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)
    gradient = method.penalty_gradient(after, batch)
    if gradient is not None:
        found = other.penalty_gradient(permute(after, order), twin_batch)
        torch.testing.assert_close(found, gradient[:, order], rtol=1e-4, atol=1e-7)


# --- shares are met -----------------------------------------------------------------------------


STRONG: dict[str, Method] = {
    "phi": PhiBalancing(NegativeEntropy().relative_to(PROPORTIONS), strength=1.0),
    "switch": SwitchLoss(strength=1.0, proportions=PROPORTIONS),
    "ema-switch": EmaSwitchLoss(strength=1.0, proportions=PROPORTIONS),
    "sequence": SequenceLoss(strength=1.0, proportions=PROPORTIONS),
    "loss-free": LossFree(speed=0.02, rule="proportional", proportions=PROPORTIONS),
    "quantile": QuantileBalancing(proportions=PROPORTIONS),
}


@pytest.mark.parametrize("name", STRONG)
def test_a_router_that_may_only_shift_its_logits_comes_to_the_shares(name):
    """Soft load for those that charge, but for Switch, which knows the hard one."""
    method = STRONG[name]
    router = BalancedRouter(method, 8, 2)
    handle = attach(router)
    noise = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    shift = torch.linspace(-1, 1, 8).requires_grad_()
    for _ in range(300):
        weights, _ = router(noise + shift, sequences=1)
        (0 * weights.sum()).backward()
        handle.step()
        with torch.no_grad():
            shift -= shift.grad
        shift.grad = None
    found = handle.metrics()
    hard, soft = handle.loads()["router"]
    load = hard if "phi" not in name else soft
    # A moving average hunts around its goal by a few per cent.
    torch.testing.assert_close(load.double(), RHO, rtol=0.08, atol=0)
    assert found["aim_maxvio"] == pytest.approx((hard.double() / RHO).max().item() - 1, abs=1e-5)
    assert found["aim_gap"] == pytest.approx((hard.double() - RHO).abs().sum().item() / 2, abs=1e-6)


def test_sinkhorn_gives_each_expert_its_share_of_the_plan():
    method = Sinkhorn(iterations=100, proportions=PROPORTIONS)
    routing = random_routing(512, 8, dtype=torch.float64)
    ranked = method.preference((), routing.gate, routing.logits, mask=None, training=True)
    torch.testing.assert_close(ranked.softmax(-1).mean(0), RHO, rtol=1e-6, atol=0)


def test_no_price_is_charged_where_the_load_is_at_the_shares():
    potential = Relative(NegativeEntropy(), PROPORTIONS)
    assert potential.grad(RHO).abs().max() < 1e-12
    even = per_proportion(RHO, PROPORTIONS)
    torch.testing.assert_close(even, torch.full_like(RHO, 1 / 8))


@pytest.mark.parametrize("name", OF_EIGHT)
def test_methods_with_shares_or_groups_train_in_a_router(name):
    """The update goes through vmap, the charge through the router's own backward."""
    router = BalancedRouter(OF_EIGHT[name], 8, 2)
    handle = attach(router)
    for seed in range(3):
        logits = random_routing(32, 8, seed=seed).logits.view(4, 8, 8).requires_grad_()
        router(logits)[0].square().sum().backward()
        assert torch.isfinite(logits.grad).all()
        handle.step()
    assert all(torch.isfinite(tensor).all() for tensor in tensors(router.state))
    assert ("aim_gap" in handle.metrics()) == (OF_EIGHT[name].traits.aim is not None)


# --- goals and metrics --------------------------------------------------------------------------

LOAD = torch.tensor([0.2, 0.1, 0.05, 0.05, 0.25, 0.05, 0.1, 0.2], dtype=torch.float64)


def test_goals_measure_relative_to_their_shares():
    ratio = (LOAD / RHO).numpy()
    rho = RHO.numpy()
    pairs = rho[:, None] * rho[None] * np.abs(ratio[:, None] - ratio[None])
    ranks = LOAD.view(2, 4).sum(-1) / RHO.view(2, 4).sum(-1)
    for goal, expected in (
        (MaxVio(1.0, proportions=PROPORTIONS), ratio.max() - 1),
        (Gini(1.0, proportions=PROPORTIONS), pairs.sum() / 2),
        (
            EntropyDeficit(1.0, proportions=PROPORTIONS),
            scipy.special.rel_entr(LOAD.numpy(), rho).sum() / np.log(8),
        ),
        (RankVio(1.0, ep_size=2, proportions=PROPORTIONS), ranks.max().item() - 1),
    ):
        assert goal.measure(LOAD).item() == pytest.approx(expected)
        assert goal.measure(RHO).item() == pytest.approx(0, abs=1e-12)
        plain = replace(goal, proportions=None)
        assert replace(goal, proportions=EQUAL).measure(LOAD).item() == pytest.approx(
            plain.measure(LOAD).item()
        )


def test_a_steered_method_is_left_alone_at_its_shares():
    hard = PhiBalancing(NegativeEntropy().relative_to(PROPORTIONS), load="hard", strength=0.05)
    aimed = Targeted(hard, MaxVio(0.3), gain=0.1)
    assert aimed.goal == MaxVio(0.3, proportions=PROPORTIONS)
    blind = replace(aimed, goal=MaxVio(0.3, proportions=EQUAL))
    multipliers = []
    for method in (aimed, blind):
        state = method.init(8)
        counts = (RHO * 1000).float()
        sums = one_batch(method, state, random_routing(500, 8)).sums._replace(counts=counts)
        for _ in range(20):
            state = method.update(state, sums)
        multipliers.append(method.multiplier(state).item())
    assert multipliers[0] < 1 < multipliers[1]


def test_what_experts_with_spare_room_serve():
    load = torch.tensor([0.5, 0.3, 0.1, 0.1])
    assert metrics.served_fraction(load, 1.2).item() == pytest.approx(0.3 + 0.3 + 0.1 + 0.1)
    assert metrics.served_fraction(load, 2.0).item() == pytest.approx(1)


# --- words and errors ---------------------------------------------------------------------------


def test_shares_in_words_reach_method_potential_and_goal():
    words = "phi(proportions='2x4, 6x1', target=0.3)+loss-free(proportions='2x4, 6x1')"
    proportions = (4.0, 4.0, *[1.0] * 6)
    method = build_method(words)
    phi = PhiBalancing(NegativeEntropy().relative_to(proportions))
    assert method == Together(
        Targeted(phi, MaxVio(0.3, proportions=proportions)), LossFree(proportions=proportions)
    )
    goal = "{'name': 'Gini', 'at_most': 0.1, 'proportions': '4x1, 4x2'}"
    assert build_method(f"switch(proportions=[1, 2], target={goal})") == Targeted(
        SwitchLoss(proportions=(1, 2)), Gini(0.1, proportions=(1.0,) * 4 + (2.0,) * 4)
    )
    table = {"name": "Tsallis", "unit_slope": True, "groups": 2, "proportions": "4x1", "weight": 3}
    expected = 3 * POTENTIALS["tsallis"].unit_slope().grouped(2).relative_to((1.0,) * 4)
    built = build_method("plug-in", {"plug-in": {"potential": {**table, "alpha": 1.3}}})
    assert built == PlugInLoss(expected)
    levels = "[{'name': 'NegativeEntropy', 'groups': 4}, {'name': 'Euclidean', 'weight': 0.1}]"
    assert build_method(f"phi(potential={levels})") == PhiBalancing(
        NegativeEntropy().grouped(4) + 0.1 * POTENTIALS["euclidean"]
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SwitchLoss(proportions=(1, 0)), "finite number above 0.*Remove an expert"),
        (lambda: SwitchLoss(proportions=(1, float("inf"))), "finite number above 0"),
        (lambda: LossFree(proportions=(1,)), "one for each expert"),
        (lambda: LossFree(proportions=(1, 2)).init(8), "for 2 experts, but the layer has 8"),
        (
            lambda: BalancedRouter(SwitchLoss(proportions=(1, 2)), 8, 2),
            "for 2 experts, but the layer has 8",
        ),
        (
            lambda: BalancedRouter(Sinkhorn(proportions=(1, 2)), 8, 2),
            "for 2 experts, but the layer has 8",
        ),
        (
            lambda: Targeted(SwitchLoss(), MaxVio(0.1, proportions=(1, 2))).init(8),
            "for 2 experts, but the layer has 8",
        ),
        (lambda: build_method("switch(proportions='8y4')"), "write them like '8x4, 24x1'"),
        (lambda: build_method("z-loss(proportions='8x4')"), "no option 'proportions'"),
        (lambda: build_method("phi(potential=[])"), "one or more"),
    ],
)
def test_impossible_shares_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("given", ["12", torch.ones(2), 3, (1, "a"), (True, 1)])
def test_shares_are_numbers_in_a_row(given):
    with pytest.raises(TypeError, match="proportions="):
        as_proportions(given)


PAGE = (Path(__file__).parents[1] / "docs/targets.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_python_on_the_page_about_targets_runs(block):
    exec(compile(block, "docs/targets.md", "exec"), {})


def test_methods_without_shares_are_called_as_before():
    assert repr(LossFree()) == (
        "LossFree(scale='affinity', speed=0.001, rule='sign', recentre=False)"
    )
    assert repr(MaxVio(0.3)) == "MaxVio(at_most=0.3, load='hard')"
