"""Megatron-Core: gradients and prices of our methods against its own, and the term's strength."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron_models import (
    EXPERTS,
    HIDDEN,
    RELEASE,
    TOP_K,
    MicroBatch,
    alone,
    attach,
    balanced,
    empty_log,
    make_config,
    make_tower,
    moe_utils,
    normal,
    run_step,
    wrap,
)
from torch import Tensor, nn

from cases import GATES, METHODS
from moebalance import (
    BalancedRouter,
    Balancing,
    GlobalBatchLoss,
    LossFree,
    Method,
    NegativeEntropy,
    PhiBalancing,
    SequenceLoss,
    Sinkhorn,
    SwitchLoss,
    ZLoss,
)
from moebalance.potentials import Potential, Tsallis

pytestmark = pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning")

STRENGTH = 0.1
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax after top-k": {},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "one expert": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    "float64": {"moe_router_dtype": "fp64"},
}
PHI = PhiBalancing(strength=STRENGTH, rate=0.5, peek=False)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with alone():
        yield


def micro_batches(*, padded: bool = False, number: int = 2, seed: int = 0) -> list[MicroBatch]:
    """(8, 2 · `number`, H) in all, cut into micro-batches; a third of it padding, or none."""
    hidden = normal((8, 4, HIDDEN), seed)
    real = normal((8, 4), seed + 50) < 0.5 if padded else torch.ones(8, 4, dtype=torch.bool)
    return [
        MicroBatch(h.contiguous(), ~r.T.contiguous() if padded else None, int(r.sum()))
        for h, r in zip(hidden.chunk(number, 1), real.chunk(number, 1), strict=True)
    ]


def square(output: Tensor) -> Tensor:
    return output.square().mean()


def gradients(
    method: Method | None, *, task: Any = None, padded: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """Router gradients of one step of two micro-batches."""
    config = make_config(**settings)
    model = wrap(make_tower(config)) if method is None else balanced(method, **settings)[0]
    batches = micro_batches(padded=padded)
    return run_step(model, batches) if task is None else run_step(model, batches, task)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("router", ROUTERS)
def test_switch_loss_is_megatrons_aux_loss(router, padded):
    stock = gradients(
        None,
        padded=padded,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=STRENGTH,
        **ROUTERS[router],
    )
    assert_equal(gradients(SwitchLoss(STRENGTH), padded=padded, **ROUTERS[router]), stock)


@pytest.mark.skipif(RELEASE < (0, 18), reason="0.18 brought this score function")
def test_switch_loss_is_megatrons_aux_loss_under_the_root_of_the_softplus():
    settings = {"moe_router_score_function": "sqrtsoftplus"}
    stock = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": STRENGTH}
    assert_equal(gradients(SwitchLoss(STRENGTH), **settings), gradients(None, **settings, **stock))


@pytest.mark.skipif(RELEASE < (0, 17), reason="0.17 brought repeated prediction layers")
@pytest.mark.parametrize("per_token", [False, True], ids=["", "per token"])
def test_a_prediction_layer_that_is_called_twice_is_charged_once(per_token, monkeypatch):
    settings = {"mtp_num_layers": 2, "calculate_per_token_loss": per_token}
    stock = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": STRENGTH}
    towers = []
    for method, more in ((None, stock), (SwitchLoss(STRENGTH), {})):
        config = make_config(**settings, **more)
        config.mtp_use_repeated_layer = True
        towers.append(make_tower(config, method, is_mtp_layer=True))
    monkeypatch.setattr(*empty_log())  # it is as long as the models before had layers
    expected, found = (wrap(tower) for tower in towers)
    attach(found)
    plain = gradients(SwitchLoss(STRENGTH), calculate_per_token_loss=per_token)
    expected = run_step(expected, micro_batches())
    assert_equal(run_step(found, micro_batches()), expected)
    assert_equal({name: 2 * g for name, g in expected.items()}, plain)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        ("aux_loss", SwitchLoss(STRENGTH)),
        ("seq_aux_loss", SequenceLoss(STRENGTH)),
        ("global_aux_loss", GlobalBatchLoss(STRENGTH)),
    ],
    ids=["batch", "sequence", "global batch"],
)
def test_per_token_loss_multiplies_every_term_by_its_tokens_as_megatron_does(kind, ours):
    stock = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": STRENGTH}
    expected = gradients(None, calculate_per_token_loss=True, **stock)
    if kind == "seq_aux_loss" and RELEASE < (0, 19):
        # A fault until 0.19: it multiplies by the tokens of one of the two sequences.
        expected = {name: 2 * gradient for name, gradient in expected.items()}
    assert_equal(gradients(ours, calculate_per_token_loss=True), expected)


@pytest.mark.parametrize("per_token", [False, True], ids=["", "per token"])
def test_task_and_term_are_weighed_as_megatron_weighs_them(per_token):
    settings = {"calculate_per_token_loss": per_token}
    stock = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": STRENGTH}
    expected = gradients(None, task=square, **settings, **stock)
    assert_equal(gradients(SwitchLoss(STRENGTH), task=square, **settings), expected)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [("seq_aux_loss", SequenceLoss(STRENGTH)), ("global_aux_loss", GlobalBatchLoss(STRENGTH))],
    ids=["sequence", "global batch"],
)
@pytest.mark.parametrize("router", ["softmax after top-k", "sigmoid"])
def test_the_other_losses_are_megatrons_too(router, kind, ours):
    stock = {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": STRENGTH}
    expected = gradients(None, **stock, **ROUTERS[router])
    assert_equal(gradients(ours, **ROUTERS[router]), expected)


def test_z_loss_is_megatrons():
    expected = gradients(None, moe_z_loss_coeff=STRENGTH)
    assert_equal(gradients(ZLoss(STRENGTH)), expected)


def test_megatrons_z_loss_may_stay_beside_a_method():
    expected = gradients(None, moe_z_loss_coeff=STRENGTH)
    assert_equal(gradients(PHI, moe_z_loss_coeff=STRENGTH), expected)


@pytest.mark.parametrize("potential", [NegativeEntropy(), Tsallis(alpha=1.3)], ids=repr)
def test_phi_is_megatrons_loss_with_the_potentials_gradient_for_token_counts(potential: Potential):
    model, balancing = balanced(
        PhiBalancing(potential, STRENGTH, peek=False, unit="paper"), num_layers=1
    )
    run_step(model, micro_batches(seed=7))
    (layer,) = balancing.layers.values()
    price = potential.grad(layer.state.mean)

    batches = micro_batches(number=1)
    weight = model.module.layers[0].router.weight.detach().clone().requires_grad_()
    scores = (batches[0].hidden.view(-1, HIDDEN) @ weight.T).softmax(-1)
    tokens = scores.shape[0]
    loss = moe_utils.switch_load_balancing_loss_func(
        scores, TOP_K * tokens * price, tokens, TOP_K, EXPERTS, STRENGTH
    )
    (expected,) = torch.autograd.grad(loss, weight)
    assert_equal(run_step(model, batches), {"layers.0.router.weight": expected})


@pytest.mark.parametrize("native", [True, False], ids=["expert_bias", "re-selection"])
def test_loss_free_moves_as_megatrons_expert_bias(native):
    sigmoid = {"moe_router_score_function": "sigmoid"}
    stock_settings = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.02}
    stock = wrap(make_tower(make_config(**sigmoid, **stock_settings)))
    bias = {"moe_router_enable_expert_bias": native, "moe_router_bias_update_rate": 0.0}
    ours, balancing = balanced(LossFree(speed=0.02), **sigmoid, **bias)
    for step in range(6):
        expected = run_step(stock, micro_batches(seed=step), square)
        assert_equal(run_step(ours, micro_batches(seed=step), square), expected)
        for theirs, layer in zip(stock.module.layers, balancing.layers.values(), strict=True):
            assert torch.equal(-layer.price, theirs.router.expert_bias)
    assert max(layer.price.abs().max() for layer in balancing.layers.values()) > 0.05
    for layer in ours.module.layers if native else ():
        assert torch.equal(layer.router.expert_bias, -layer.router.balance.price)


def test_sinkhorn_chooses_as_megatrons():
    stock = make_tower(make_config(moe_router_load_balancing_type="sinkhorn")).layers[0].router
    model, _ = balanced(Sinkhorn(iterations=300))
    hidden = normal((64, 2, HIDDEN), seed=3)
    _, plain = make_tower(make_config()).layers[0].router(hidden)
    _, expected = stock(hidden)
    _, chosen = model.module.layers[0].router(hidden)
    assert torch.equal(chosen, expected)
    assert not torch.equal(chosen, plain)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_what_it_is_in_a_router_of_our_own(name, gate):
    method = METHODS[name]
    model, balancing = balanced(method, num_layers=1, moe_router_score_function=gate)
    weight = model.module.layers[0].router.weight.detach().clone().requires_grad_()
    router = BalancedRouter(method, EXPERTS, TOP_K, gate=GATES[gate])
    reference = Balancing(method, {"router": router})
    reference.set_loss_scale(0.5)  # two micro-batches
    for step in range(3):
        batches = micro_batches(padded=True, seed=step)
        (found,) = run_step(model, batches).values()
        weight.grad = None
        for hidden, padding, _ in batches:
            weights, _ = router(hidden.transpose(0, 1) @ weight.T, ~padding)
            (0 * weights.sum()).backward()
        torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-7)
        reference.step()
    assert bool(weight.grad.any()) == method.traits.charges
    (layer,) = balancing.layers.values()
    for key, tensor in router.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], tensor, msg=key)
    assert torch.equal(layer.last_sums.counts, router.last_sums.counts)


@pytest.mark.parametrize("per_token", [False, True], ids=["", "per token"])
def test_the_number_of_micro_batches_changes_nothing(per_token):
    found = []
    for number in (1, 2, 4):
        model, _ = balanced(PHI, calculate_per_token_loss=per_token)
        for step in range(2):
            gradient = run_step(model, micro_batches(number=number, seed=step))
        found.append(gradient)
    for other in found[1:]:
        assert_equal(other, found[0])


def test_per_token_loss_makes_the_term_a_mean_over_the_steps_real_tokens():
    """Micro-batches with different numbers of them, where others take a mean of means."""
    model, balancing = balanced(PHI, num_layers=1, calculate_per_token_loss=True)
    run_step(model, micro_batches(seed=7))
    (layer,) = balancing.layers.values()
    price = EXPERTS * PHI.loss_price(layer.state, None)
    batches = micro_batches(padded=True)
    assert batches[0].tokens != batches[1].tokens
    weight = model.module.layers[0].router.weight.detach().clone().requires_grad_()
    real = [hidden.transpose(0, 1)[~padding] for hidden, padding, _ in batches]
    term = ((torch.cat(real) @ weight.T).softmax(-1) @ price).mean()
    (expected,) = torch.autograd.grad(term, weight)
    assert_equal(run_step(model, batches), {"layers.0.router.weight": expected})


def test_a_gradient_scaler_scales_the_term_with_the_task():
    plain, scaled = (
        balanced(SwitchLoss(STRENGTH), grad_scale_func=scale)[0]
        for scale in (None, lambda loss: 1024 * loss)
    )
    expected = run_step(plain, micro_batches(), square)
    found = run_step(scaled, micro_batches(), square)
    assert_equal({name: gradient / 1024 for name, gradient in found.items()}, expected)


def test_training_on_the_term_alone_balances():
    model, balancing = balanced(PhiBalancing(strength=1.0, rate=0.3))
    routers = [layer.router for layer in model.module.layers]
    seen = []
    for step in range(30):
        # Tokens that have something in common, so that routers have a favourite.
        batches = [b._replace(hidden=b.hidden + 1) for b in micro_batches(seed=step)]
        run_step(model, batches)
        with torch.no_grad():
            for router in routers:
                router.weight -= 0.2 * router.weight.main_grad
        seen.append(balancing.metrics()["soft_maxvio"])
    assert seen[0] > 1.5
    assert max(seen[-3:]) < 0.5


def test_steps_with_replayed_routing_move_no_selection_price():
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

    model, balancing = balanced(LossFree(speed=0.01), num_layers=1, moe_enable_routing_replay=True)
    layer = next(iter(balancing.layers.values()))
    try:
        for action in (RouterReplayAction.REPLAY_FORWARD, None):
            hidden = normal((8, 2, HIDDEN), 0)
            for replay in RouterReplay.global_router_replay_instances:
                replay.set_target_indices(torch.tensor([[0, 1]]).expand(16, TOP_K))
            if action is None:
                RouterReplay.clear_global_router_replay_action()
            else:
                RouterReplay.set_global_router_replay_action(action)
            run_step(model, [MicroBatch(hidden)])
            assert layer.last_sums.tokens == 16
            assert bool(layer.price.any()) is (action is None)
    finally:
        RouterReplay.clear_global_router_replay_action()
        RouterReplay.clear_global_router_replay_instances()
        balancing.detach()


class Packing(nn.Module):
    """A tower that is called as Megatron calls its layers, with what says where sequences end."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower, self.config = tower, tower.config

    def forward(self, hidden: Tensor, packed_seq_params: Any = None) -> Tensor:
        return self.tower(hidden)


@pytest.mark.parametrize("layers", [1, 2])
def test_packed_sequences_are_charged_one_by_one(layers):
    """Two samples of 8 tokens side by side, and as one row of 16 with boundaries."""
    from megatron.core.packed_seq_params import PackedSeqParams

    hidden = normal((8, 2, HIDDEN), 0) + 4 * normal((1, 2, HIDDEN), 5)
    row = hidden.transpose(0, 1).reshape(16, 1, HIDDEN)
    ends = torch.tensor([0, 8, 16], dtype=torch.int32)
    told = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    found = []
    for given, more in ((hidden, {}), (row, {"packed_seq_params": told}), (row, {})):
        model = Packing(make_tower(make_config(num_layers=layers), SequenceLoss(STRENGTH)))
        balancing = attach(model, step_by_hand=True)
        (0 * model(given, **more)).sum().backward()
        found.append([layer.router.weight.grad.clone() for layer in model.tower.layers])
        balancing.step()
        assert balancing.metrics()["tokens"] == 16
        balancing.detach()
    for apart, one, unknown in zip(*found, strict=True):
        torch.testing.assert_close(one, apart, rtol=1e-5, atol=1e-8)
        assert (unknown - apart).abs().max() > 0.1 * apart.abs().max()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "loses them"),
        ({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, None),
    ],
    ids=["moe", "attention"],
)
def test_packed_sequences_that_are_lost_in_recomputation_are_refused(settings, said):
    from megatron.core.packed_seq_params import PackedSeqParams

    from moebalance.integrations.megatron.packed import bounds

    tower = make_tower(make_config(num_layers=1), SequenceLoss(STRENGTH))
    router, ends = tower.layers[0].router, torch.tensor([0, 8, 16], dtype=torch.int32)
    router.packed_seq_params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends)
    for name, value in settings.items():
        setattr(router.config, name, value)
    if said is None:
        assert torch.equal(bounds(router), ends)
        return
    with pytest.raises(ValueError, match=said):
        bounds(router)
