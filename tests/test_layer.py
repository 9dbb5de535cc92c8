"""The body: what is injected into the gradient, on which scale, and what a router refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from cases import METHODS
from moebalance import (
    BalancedRouter,
    Balancing,
    GlobalBatchLoss,
    LossFree,
    Method,
    NoBalancing,
    PhiBalancing,
    Sigmoid,
    Sinkhorn,
    Softmax,
    SqrtSoftplus,
    Together,
)
from moebalance.core.layer import LayerBalance
from moebalance.core.state import method_name
from tiny_moe import (
    EXPERTS,
    PHI,
    ROUTERS,
    TOP_K,
    TinyMoE,
    close,
    explicit,
    gradients,
    handle,
    hidden,
    same,
    task_only,
    warm,
)

# --- the injected gradient --------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", [name for name, b in METHODS.items() if b.traits.charges])
def test_injected_gradient_is_that_of_the_term_in_the_loss(name, router):
    model = TinyMoE(METHODS[name], router)
    warm(model)
    x = hidden(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = mask[2, 1:] = False
    found = gradients(model, model(x, mask).mean())
    close(found, explicit(model, x, mask, sequences=3), 2e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_term_is_a_visible_part_of_the_gradient(router):
    """Otherwise the test above could not fail."""
    model = TinyMoE(PHI, router)
    warm(model)
    with_term, without = gradients(model, model(hidden(16)).mean()), task_only(model, hidden(16))
    assert (with_term[0] - without[0]).norm() > 0.01 * without[0].norm()


def test_injection_changes_no_output():
    model = TinyMoE()
    warm(model)
    trained = model(hidden(16))
    model.eval()
    assert torch.equal(trained, model(hidden(16)))


def test_a_method_without_charge_leaves_the_gradient_alone():
    model = TinyMoE(NoBalancing())
    assert same(gradients(model, model(hidden(16)).mean()), task_only(model, hidden(16)))


def test_the_price_moves_the_choice_and_never_the_weights():
    router = BalancedRouter(LossFree(), EXPERTS, TOP_K, gate=Sigmoid(), normalize=False)
    logits = hidden(32)[:, :EXPERTS]
    router.get_buffer("state_price").copy_(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    for training in (True, False):
        weights, experts = router.train(training)(logits)
        assert not (experts == 0).any()
        torch.testing.assert_close(weights, logits.sigmoid().gather(-1, experts))


def test_sinkhorn_selects_in_training_only():
    router = BalancedRouter(Sinkhorn(), EXPERTS, TOP_K)
    logits = hidden(32)[:, :EXPERTS] * torch.tensor([3.0, 1.0, 1.0, 1.0])
    plain = logits.topk(TOP_K).indices
    assert torch.equal(router.eval()(logits)[1], plain)
    assert not torch.equal(router.train()(logits)[1], plain)


def test_weights_have_the_dtype_of_the_logits_and_the_shape_of_the_tokens():
    router = BalancedRouter(PHI, EXPERTS, TOP_K)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        weights, experts = router(torch.randn(2, 3, EXPERTS, dtype=dtype))
        assert weights.dtype == dtype
        assert weights.shape == experts.shape == (2, 3, TOP_K)


# --- scale: the term is scaled as the loss is -------------------------------------------------


def test_accumulated_micro_batches_charge_what_one_batch_charges():
    method = PhiBalancing(strength=0.1, peek=False)
    model = TinyMoE(method)
    balancing = warm(model)
    x = hidden(24)
    whole = gradients(model, balancing.follow(model(x).mean()))
    model.zero_grad()
    for part in x.split(8):
        (balancing.follow(model(part).mean()) / 3).backward()
    close([model.gate.grad, model.experts.grad], whole)


def test_unequal_micro_batches_charge_what_one_batch_charges_given_their_weights():
    layer = LayerBalance(PhiBalancing(strength=0.1, peek=False), EXPERTS)
    balancing = Balancing(layer.method, {"layer": layer})
    logits = hidden(24)[:, :EXPERTS].requires_grad_()

    def run(rows, weight=None):
        z = logits[rows]
        top = z.detach().topk(TOP_K).indices
        return layer.tie(z.gather(-1, top), z, top, weight=weight)

    (0 * run(slice(None)).sum()).backward()
    balancing.step()
    logits.grad = None
    balancing.follow(0 * run(slice(None)).sum()).backward()
    whole, logits.grad = logits.grad, None
    for rows in (slice(0, 4), slice(4, 10), slice(10, 24)):
        weight = torch.tensor((rows.stop - rows.start) * 3 / 24)
        (balancing.follow(0 * run(rows, weight).sum()) / 3).backward()
    assert whole.norm() > 0
    close([logits.grad], [whole])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_scaled_loss_scales_the_term_alike(in_place):
    model = TinyMoE()
    balancing = warm(model)
    expected = explicit(model, hidden(16))
    loss = balancing.follow(model(hidden(16)).mean())
    if in_place:
        loss *= 1024
    else:
        loss = 1024 * loss
    close([g / 1024 for g in gradients(model, loss)], expected)


def test_following_ends_with_the_step():
    model = TinyMoE()
    balancing = warm(model)
    (1024 * balancing.follow(model(hidden(16)).mean())).backward()
    balancing.step()
    close(gradients(model, model(hidden(16)).mean()), explicit(model, hidden(16)))


def test_a_fixed_scale_holds_over_steps_for_losses_that_are_not_followed():
    model = TinyMoE()
    balancing = warm(model)
    balancing.set_loss_scale(0.25)
    for _ in range(2):
        expected = explicit(model, hidden(16), scale=0.25)
        loss = model(hidden(16)).mean()
        close(gradients(model, loss), expected)
        balancing.step()


def test_following_returns_the_same_loss():
    balancing = handle(TinyMoE())
    loss = torch.tensor(1.5, requires_grad=True)
    assert torch.equal(balancing.follow(loss), loss)


def test_peek_takes_a_micro_batch_for_its_share_of_the_last_step():
    model = TinyMoE()
    balancing = warm(model)
    for seed in (1, 2):
        model(hidden(12, seed=seed)).mean().backward()
    balancing.step()
    close(gradients(model, model(hidden(6)).mean()), explicit(model, hidden(6), share=0.25))


def test_peek_takes_a_batch_for_the_whole_step_where_steps_are_one_batch():
    model = TinyMoE()
    warm(model)
    close(gradients(model, model(hidden(6)).mean()), explicit(model, hidden(6), share=1.0))


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: BalancedRouter(PHI, 4, 5), ValueError, "top_k=5 with num_experts=4"),
        (lambda: BalancedRouter(PHI, 4, 0), ValueError, "top_k=0"),
        (lambda: BalancedRouter(PHI, 1, 1), ValueError, "num_experts=1"),
        (lambda: BalancedRouter("phi", 4, 2), TypeError, "method='phi'"),
        (lambda: BalancedRouter(PhiBalancing, 4, 2), TypeError, "PhiBalancing"),
        (
            lambda: BalancedRouter(PHI, 4, 2, name="layers.3")(torch.zeros(5, 3)),
            ValueError,
            r"layers\.3: logits of shape \(5, 3\) for 4 experts",
        ),
        (
            lambda: BalancedRouter(PHI, 4, 2)(torch.zeros(2, 5, 4), torch.ones(2, 4)),
            ValueError,
            r"mask of shape \(2, 4\)",
        ),
        (
            lambda: BalancedRouter(PHI, 4, 2)(torch.zeros(2, 5, 4), torch.ones(10)),
            ValueError,
            r"mask of shape \(10,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_was_given(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_a_router_shows_its_method_and_size():
    shown = repr(BalancedRouter(PHI, 4, 2))
    assert repr(PHI) in shown
    assert "num_experts=4" in shown


def test_a_method_is_named_by_its_classes():
    assert method_name(Together(PHI, LossFree())) == "Together(PhiBalancing, LossFree)"


@dataclass(frozen=True)
class Squares(Method):
    """A stranger's method that knows its term and no gradient."""

    def penalty(self, state, batch):
        return 0.1 * batch.routing.logits.square().mean()


def test_a_method_that_gives_only_a_penalty_is_charged():
    assert Squares().traits.charges
    router = BalancedRouter(Squares(), 4, 2)
    logits = torch.randn(6, 4, requires_grad=True)
    (0 * router(logits)[0].sum()).backward()
    torch.testing.assert_close(logits.grad, 0.2 * logits.detach() / logits.numel())


def test_weights_can_be_scaled_in_place():
    weights, _ = BalancedRouter(Squares(), 4, 2)(torch.randn(6, 4, requires_grad=True))
    weights *= 2
    weights.sum().backward()


def test_a_method_beside_one_that_sees_the_step_so_far_keeps_its_share_of_the_step():
    """The more coupled of the two decides for both, and neither loses what it may look at."""
    alone = TinyMoE(PHI)
    beside = TinyMoE(Together(GlobalBatchLoss(strength=0.0), PHI))
    found = []
    for model in (alone, beside):
        balancing = handle(model)
        for seed in (0, 1):  # of two batches, so that from the second step on a share is a half
            gradients_of = [
                gradients(model, model(hidden(16, seed=2 * seed + i)).mean()) for i in (0, 1)
            ]
            balancing.step()
        found.append(gradients_of[0])
    close(found[1], found[0])


# --- what a body counts and charges from affinities --------------------------------------------

GATES = [Softmax(), Sigmoid(), SqrtSoftplus()]
every_gate = pytest.mark.parametrize("gate", GATES, ids=["softmax", "sigmoid", "sqrt-softplus"])
every_place = pytest.mark.parametrize("attached", [False, True], ids=["own", "attached"])


def charged(logits, gate, *, attached: bool, mask=None, scale: float = 1.0):
    """Gradient of the charge alone, and the sums of the batch."""
    layer = BalancedRouter(PHI, logits.shape[-1], TOP_K, gate=gate, normalize=False)
    layer.loss_scale.fill_(scale)
    logits = logits.clone().requires_grad_()
    if attached:
        experts = logits.detach().topk(TOP_K, dim=-1).indices
        carrier = torch.ones_like(experts, dtype=logits.dtype).requires_grad_()
        weights = layer.tie(carrier, logits, experts, mask=mask)
    else:
        weights, _ = layer(logits, mask)
    weights.backward(torch.zeros_like(weights))
    return logits.grad, layer.running


@every_gate
@every_place
def test_double_precision_is_charged_in_double_precision(gate, attached):
    logits = hidden(32)[:, :EXPERTS].double()
    found, _ = charged(logits, gate, attached=attached)
    single, _ = charged(logits.float(), gate, attached=attached)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), single, rtol=1e-4, atol=1e-7)
    assert found.abs().max() > 1e-4


@every_gate
@pytest.mark.parametrize("held", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_padding_holds_reaches_no_gradient_of_an_attached_router(gate, held):
    logits, mask = hidden(32)[:, :EXPERTS], torch.arange(32) > 3
    clean, sums = charged(logits[4:], gate, attached=True)
    logits[:4] = held
    found, padded = charged(logits, gate, attached=True, mask=mask)
    assert not found[:4].any()
    torch.testing.assert_close(found[4:], clean)
    torch.testing.assert_close(padded, sums)


@every_place
@pytest.mark.parametrize("level", [-60, -86, -95])
def test_a_token_whose_sigmoids_underflow_does_not_break_the_gradient(level, attached):
    """Under a gradient scaler's usual scale."""
    logits = hidden(32)[:, :EXPERTS]
    logits[0] = logits[0] + level
    found, sums = charged(logits, Sigmoid(), attached=attached, scale=65536.0)
    assert found.isfinite().all()
    counted = sums[:EXPERTS].sum()
    assert 31 - 1e-3 <= counted <= 32 + 1e-3
    if level == -60:
        torch.testing.assert_close(counted, torch.tensor(32.0))


def test_a_method_from_sums_with_sums_of_its_own_is_refused():
    class Both(PhiBalancing):
        def extra_shapes(self, num_experts):
            return ((2,),)

    with pytest.raises(TypeError, match="sums of its own"):
        LayerBalance(Both(), 4)


def test_a_router_that_was_pickled_before_there_were_limits_still_routes():
    router = BalancedRouter(PHI, EXPERTS, TOP_K)
    del router.__dict__["limit"]
    weights, _ = router(hidden(8)[:, :EXPERTS].requires_grad_())
    weights.sum().backward()


@pytest.mark.parametrize("gate", ["sigmoid", Sigmoid], ids=["word", "class"])
def test_a_gate_that_is_none_is_refused_at_once(gate):
    with pytest.raises(TypeError, match="must be a Gate, for example"):
        BalancedRouter(PHI, EXPERTS, TOP_K, gate=gate)


@every_gate
def test_weights_that_get_no_gradient_are_counted_and_charged_all_the_same(gate):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weights):
            return weights.sum()

        @staticmethod
        def backward(ctx, upstream):
            return None

    layer = BalancedRouter(PHI, EXPERTS, TOP_K, gate=gate, normalize=False)
    logits = hidden(32)[:, :EXPERTS].requires_grad_()
    Stop.apply(layer(logits)[0]).backward()
    expected, sums = charged(logits.detach(), gate, attached=False)
    torch.testing.assert_close(logits.grad, expected)
    torch.testing.assert_close(layer.running, sums)
