"""Megatron-Core: what is chosen and counted, when a step ends, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import megatron.core
import pytest
import torch
from megatron_models import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    MicroBatch,
    RouterReplay,
    RouterReplayAction,
    alone,
    attach,
    balanced,
    finalize_model_grads,
    make_config,
    make_tower,
    normal,
    run_step,
    wrap,
)
from torch import Tensor, nn

from moebalance import (
    LossFree,
    Method,
    NoBalancing,
    PhiBalancing,
    Sinkhorn,
    SwitchLoss,
    Together,
    ZLoss,
)
from moebalance.integrations.megatron import BalancedTopKRouter
from moebalance.integrations.megatron.release import check_release
from moebalance.methods.forced import Forced

pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")

PHI = PhiBalancing(strength=0.1, rate=0.5)
RESET = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.0}
"""Megatron tells its routers when a step ends."""

GROUPS = {"num_moe_experts": 8, "moe_router_num_groups": 4, "moe_router_group_topk": 2}
CHOICES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "before": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "groups": {**GROUPS, "moe_router_score_function": "sigmoid"},
    "dropping": {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"},
    "bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with alone():
        yield


def batch(seed: int = 0, padding: Tensor | None = None) -> MicroBatch:
    return MicroBatch(normal((8, 2, HIDDEN), seed), padding)


def router_of(model: nn.Module, layer: int = 0) -> BalancedTopKRouter:
    return model.module.layers[layer].router


def set_price(router: BalancedTopKRouter, *price: float) -> None:
    router.balance.adopt(torch.tensor(price))
    router.publish_price()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_method_that_only_charges_changes_no_weight_and_no_choice(choice, training):
    stock = make_tower(make_config(**CHOICES[choice])).layers[0].router.train(training)
    ours = router_of(balanced(PHI, **CHOICES[choice])[0]).train(training)
    for found, expected in zip(ours(batch().hidden), stock(batch().hidden), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("choice", ["softmax", "before", "sigmoid", "groups"])
def test_a_price_moves_the_choice_and_leaves_the_weights_their_own(choice):
    settings = CHOICES[choice]
    router = router_of(balanced(LossFree(), **settings)[0])
    experts = router.balance.num_experts
    set_price(router, 9.0, *[0.0] * (experts - 1))
    hidden = batch().hidden
    weights, chosen = router(hidden)
    assert not chosen[:, 0].any()
    assert (chosen.sum(1) == TOP_K).all()
    assert torch.equal(weights > 0, chosen)
    # Megatron's own rule, with the dear expert out of reach of its logits.
    stock = make_tower(make_config(**settings)).layers[0].router
    logits = stock.gating(hidden).detach().clone()
    logits[..., 0] = -30
    expected, _ = stock.routing(logits)
    if not settings.get("moe_router_pre_softmax"):
        torch.testing.assert_close(weights, expected)
    else:  # there the dear expert keeps its part of the softmax
        scores = (hidden @ router.weight.T).softmax(-1).view(-1, experts)
        torch.testing.assert_close(weights, 2.5 * scores * chosen)


def test_groups_and_price_choose_as_megatrons_bias_does():
    native, ranked = (
        router_of(balanced(LossFree(), **(CHOICES["groups"] | bias))[0])
        for bias in (CHOICES["bias"], {})
    )
    price = (0.3, -0.2, 0.1, 0.0, -0.3, 0.2, 0.05, -0.15)
    for router in (native, ranked):
        set_price(router, *price)
    assert native.expert_bias is not None
    assert ranked.expert_bias is None
    for found, expected in zip(ranked(batch().hidden), native(batch().hidden), strict=True):
        torch.testing.assert_close(found, expected)


def test_dropped_tokens_are_counted_where_they_wanted_to_go():
    model, balancing = balanced(PHI, **CHOICES["dropping"])
    _, chosen = router_of(model)(batch().hidden)
    assert chosen.sum() < 16 * TOP_K
    run_step(model, [batch()])
    for layer in balancing.layers.values():
        assert layer.last_sums.counts.sum() == 16 * TOP_K


def test_a_recorded_choice_is_replayed_under_another_price():
    try:
        model, balancing = balanced(LossFree(), num_layers=1, moe_enable_routing_replay=True)
        router, (replay,) = router_of(model), RouterReplay.global_router_replay_instances
        replay.set_router_replay_action(RouterReplayAction.RECORD)
        set_price(router, 0.5, 0.0, 0.0, 0.0)
        expected = router(batch().hidden)
        set_price(router, 0.0, 0.0, 0.0, 0.5)
        assert not torch.equal(router(batch().hidden)[1], expected[1])
        set_price(router, 0.5, 0.0, 0.0, 0.0)
        router(batch().hidden)
        replay.set_target_indices(replay.get_recorded_indices())
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        set_price(router, 0.0, 0.0, 0.0, 0.5)
        for found, first in zip(router(batch().hidden), expected, strict=True):
            assert torch.equal(found, first)
        run_step(model, [batch()])
        (layer,) = balancing.layers.values()
        assert torch.equal(layer.last_sums.counts, expected[1].sum(0).float())
    finally:
        RouterReplay.clear_global_router_replay_instances()


def test_padding_is_neither_counted_nor_charged():
    model, balancing = balanced(SwitchLoss(0.1), num_layers=1)
    padding = torch.zeros(2, 8, dtype=torch.bool)
    padding[0, 3:] = True
    found = run_step(model, [batch(padding=padding)])
    (layer,) = balancing.layers.values()
    assert layer.last_sums.tokens == 11
    assert layer.last_sums.counts.sum() == 11 * TOP_K
    other = batch(padding=padding)
    other.hidden[3:, 0] = 100.0
    again = run_step(model, [other])
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(again[name], gradient)


def test_megatrons_own_bias_cannot_count_with_padding():
    """Documents why a padding mask must not reach its counter: it masks experts, not tokens."""
    config = make_config(**(CHOICES["bias"] | {"moe_router_bias_update_rate": 0.01}))
    stock = make_tower(config).layers[0]
    padding = torch.zeros(2, 8, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="size of tensor"):
        stock(batch().hidden, padding_mask=padding)


def test_evaluation_and_forwards_without_gradient_count_nothing():
    model, balancing = balanced(PHI)
    balancing.watch()
    run_step(model, [batch()])
    with torch.no_grad():
        model(batch().hidden)
    model.eval()
    model(batch().hidden)
    model.train()
    assert all(not layer.running.any() for layer in balancing.layers.values())
    _, loads = balancing.evaluation()
    assert all(hard.sum() == 1 for hard, _ in loads.values())


def test_recomputed_layers_count_once_and_charge_the_same(monkeypatch):
    from megatron.core.tensor_parallel import random

    # The state of CUDA's generators is none of a CPU's.
    monkeypatch.setattr(random, "_get_all_rng_states", lambda: ())
    monkeypatch.setattr(random, "_set_all_rng_states", lambda: None)
    settings = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    plain, expected_balancing = balanced(SwitchLoss(0.1))
    model, balancing = balanced(SwitchLoss(0.1), **settings)
    assert model.module.layers[0].moe_layer_recompute
    task = torch.Tensor.sum
    needs_gradient = [batch()._replace(hidden=batch().hidden.requires_grad_()) for _ in range(2)]
    expected = run_step(plain, needs_gradient, task)
    found = run_step(model, needs_gradient, task)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    for name, layer in balancing.layers.items():
        assert layer.last_sums.tokens == 32
        assert torch.equal(layer.last_sums.counts, expected_balancing.layers[name].last_sums.counts)


@pytest.mark.parametrize(
    ("settings", "wrapped"),
    [({}, True), (RESET, False), (RESET, True)],
    ids=["wrapped", "reset", "both"],
)
def test_a_step_ends_once_where_megatron_ends_it(settings, wrapped):
    model = wrap(make_tower(make_config(**settings), PHI))
    if not wrapped:
        model.config.finalize_model_grads_func = None
    balancing = attach([model])
    if not wrapped:  # as Megatron-LM's train() does, after the model was built
        model.config.finalize_model_grads_func = finalize_model_grads
    for step in range(3):
        assert balancing.steps == step
        run_step(model, [batch(), batch(1)])
    assert balancing.steps == 3
    for layer in balancing.layers.values():
        assert layer.last_step.tolist() == [32, 2]


def test_training_without_an_end_of_step_is_refused():
    model, _ = balanced(PHI)
    model.config.finalize_model_grads_func = finalize_model_grads
    with pytest.raises(RuntimeError, match="Nothing ends the steps"):
        run_step(model, [batch()])
    model.eval()
    model(batch().hidden)


def test_training_without_a_handle_is_refused():
    model = wrap(make_tower(make_config(), PHI))
    with pytest.raises(RuntimeError, match=r"attach\(model\)"):
        run_step(model, [batch()])


def test_a_loop_of_ones_own_steps_by_hand():
    model = wrap(make_tower(make_config(**RESET), PHI))
    balancing = attach(model, step_by_hand=True)
    run_step(model, [batch()])
    assert balancing.steps == 0
    balancing.step()
    assert balancing.layers["layers.0.router"].last_sums.tokens == 16


def test_detaching_gives_megatron_its_function_back():
    model, balancing = balanced(PHI)
    balancing.detach()
    assert model.config.finalize_model_grads_func is finalize_model_grads
    attach(model)


def test_a_sick_batch_stops_training_and_names_the_layer():
    model, balancing = balanced(PHI)
    sick = batch()
    sick.hidden[0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"layers\.0\.router"):
        run_step(model, [sick])
    assert balancing.steps == 0


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (PHI, {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}, "second"),
        (
            PHI,
            {
                "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
                "moe_aux_loss_coeff": [0.0, 0.01],
            },
            "seq_aux_loss",
        ),
        (PHI, {"moe_router_load_balancing_type": "sinkhorn"}, r"Sinkhorn\(\)"),
        (PHI, {"moe_router_load_balancing_type": "quantile"}, "'quantile'"),
        (
            PHI,
            {"moe_router_load_balancing_type": "quantile_balancing"},
            r"'quantile_balancing'.*the method QuantileBalancing\(scale=.nats.\)",
        ),
        (PHI, CHOICES["bias"] | {"moe_router_bias_update_rate": 0.01}, "bias_update_rate=0"),
        (Sinkhorn(), CHOICES["bias"], "ignore the expert bias"),
        (Together(PHI, ZLoss()), {"moe_z_loss_coeff": 0.01}, "keep one"),
        (PHI, {"moe_router_force_load_balancing": True}, "noise"),
    ],
)
def test_settings_that_would_be_ignored_or_doubled_are_refused(
    method: Method, settings: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=message):
        make_tower(make_config(**settings), method)


def test_the_fused_router_and_unknown_scores_are_refused():
    for name, value in (("moe_router_fusion", True), ("moe_router_score_function", "tanh")):
        config = make_config()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=name):
            make_tower(config, PHI)


def test_forced_routing_is_balanced_here_too():
    model, balancing = balanced(Forced("balanced"))
    run_step(model, [batch()])
    assert balancing.metrics()["maxvio"] == 0


def test_a_forced_bias_is_refused_by_name():
    config = make_config()
    config.moe_router_force_biased = 0.5
    with pytest.raises(ValueError, match=r"moe_router_force_biased=0\.5"):
        make_tower(config, PHI)


def test_an_unknown_release_is_refused_by_name(monkeypatch):
    for version in ("0.16.1", "0.19.0rc2", megatron.core.__version__):
        check_release(version)
    with pytest.raises(ImportError, match=r"megatron-core 0\.20\.3 .* MOEBALANCE_MEGATRON=0\.20"):
        check_release("0.20.3")
    monkeypatch.setenv("MOEBALANCE_MEGATRON", "0.20")
    check_release("0.20.3")


def test_an_unknown_balancing_type_means_none_in_megatron():
    """Documents why it is refused here."""
    strange = {"moe_router_load_balancing_type": "quantile", "moe_aux_loss_coeff": 1.0}
    for gradient in run_step(wrap(make_tower(make_config(**strange))), [batch()]).values():
        assert not gradient.any()


def test_models_that_cannot_be_balanced_are_refused():
    with pytest.raises(ValueError, match=r"layers\.0\.router \(2 of 2 routers\) is a plain"):
        attach(make_tower(make_config()))
    model, _ = balanced(PHI)
    with pytest.raises(ValueError, match="attached already"):
        attach(model)
    frozen = make_tower(make_config(), PHI)
    frozen.layers[1].router.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\.1\.router is frozen"):
        attach(frozen)
    mixed = make_tower(make_config(), PHI)
    mixed.layers[1] = make_tower(make_config(), NoBalancing()).layers[1]
    with pytest.raises(ValueError, match="one method"):
        attach(mixed)
    dense = nn.Linear(2, 2)
    dense.config = make_config()
    with pytest.raises(ValueError, match="balanced_spec"):
        attach(dense)


def test_pipeline_chunks_of_one_rank_share_a_handle():
    config = make_config()
    chunks = [make_tower(config, PHI), make_tower(config, PHI)]
    balancing = attach(chunks)
    assert list(balancing.layers) == [
        f"chunk{chunk}.layers.{layer}.router" for chunk in (0, 1) for layer in (0, 1)
    ]
    assert balancing.layers["chunk1.layers.0.router"].num_experts == EXPERTS
