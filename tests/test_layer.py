"""The body: what is injected, what is counted and how often, what is kept, saved and refused.

A two-expert-per-token layer of six inputs stands for a model; the expected gradient is always that
of the explicit term, added to the loss of the same layer without injection.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import BALANCERS, one_batch, plain_top_k, tensors
from moebalance import metrics
from moebalance.balancers import (
    LossFree,
    NoBalancing,
    PhiBalancing,
    QuantileBalancing,
    Sinkhorn,
    SwitchLoss,
    Together,
)
from moebalance.balancing import Balancing, method_name
from moebalance.layer import BalancedRouter, LayerBalance
from moebalance.routing import Sigmoid, Softmax, measure, route

EXPERTS, WIDTH, TOP_K = 4, 6, 2
PHI = PhiBalancing(strength=0.1, rate=0.5)

# torch.compile's own: Dynamo instantiates the functions that it traces, inductor uses torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


class TopKThenSoftmax(LayerBalance):
    """A hand-written router: weights are the softmax of the chosen logits."""

    def forward(self, logits, mask=None):
        flat = logits.reshape(-1, self.num_experts)
        flat_mask = None if mask is None else mask.reshape(-1)
        ranked = self.preference(flat, flat_mask, training=self.training)
        experts = (flat.detach() if ranked is None else ranked).topk(TOP_K).indices
        weights = flat.gather(-1, experts).softmax(-1)
        if self.training and torch.is_grad_enabled():
            sequences = logits.shape[0] if logits.dim() == 3 else 1
            weights = self.inject(weights, flat, experts, mask=flat_mask, sequences=sequences)
        shape = (*logits.shape[:-1], TOP_K)
        return weights.view(shape), experts.view(shape)


ROUTERS = {
    "softmax-normalised": lambda b: BalancedRouter(b, EXPERTS, TOP_K),
    "softmax": lambda b: BalancedRouter(b, EXPERTS, TOP_K, normalize=False),
    "sigmoid": lambda b: BalancedRouter(b, EXPERTS, TOP_K, gate=Sigmoid()),
    "sigmoid-unnormalised": lambda b: BalancedRouter(
        b, EXPERTS, TOP_K, gate=Sigmoid(), normalize=False
    ),
    "top-k-then-softmax": lambda b: TopKThenSoftmax(b, EXPERTS),
}


class TinyMoE(nn.Module):
    def __init__(self, balancer=PHI, router="softmax-normalised", seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gate = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=generator))
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator) / 3)
        self.router = ROUTERS[router](balancer)

    def forward(self, x, mask=None):
        weights, experts = self.router(x @ self.gate.mT, mask)
        every = torch.einsum("...i,eij->...ej", x, self.experts)
        chosen = every.gather(-2, experts.unsqueeze(-1).expand(*experts.shape, WIDTH))
        return (weights.unsqueeze(-1) * chosen).sum(-2).square().mean(-1)


def hidden(*shape, seed=0):
    """Hidden states that all point somewhat the same way, so that experts are unequally liked."""
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed)) + 0.5


def handle(model) -> Balancing:
    return Balancing(model.router.balancer, {"router": model.router})


def gradients(model, loss):
    return torch.autograd.grad(loss, [model.gate, model.experts])


def warm(model, steps=2) -> Balancing:
    """A handle on a model that has trained for some steps."""
    balancing = handle(model)
    for seed in range(steps):
        model(hidden(16, seed=50 + seed)).mean().backward()
        balancing.step()
    model.zero_grad()
    return balancing


def explicit(model, x, mask=None, *, share=1.0, scale=1.0, sequences=1):
    """Gradients of loss + scale · penalty, the loss taken without injection."""
    model.eval()
    layer, logits = model.router, x @ model.gate.mT
    with torch.no_grad():
        _, experts = layer(logits, mask)
    flat = logits.reshape(-1, EXPERTS)
    routing = route(
        flat,
        experts.reshape(-1, TOP_K),
        layer.gate,
        mask=None if mask is None else mask.reshape(-1),
        sequences=sequences,
    )
    batch = one_batch(layer.balancer, layer.state, routing, share)
    loss = model(x, mask).mean() + scale * layer.balancer.penalty(layer.state, batch)
    found = gradients(model, loss)
    model.train()
    return found


def task_only(model, x):
    model.eval()
    found = gradients(model, model(x).mean())
    model.train()
    return found


def close(found, expected, tolerance=1e-6):
    for a, b in zip(found, expected, strict=True):
        scale = max(b.abs().max().item(), 1e-12)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# --- the injected gradient --------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", [name for name, b in BALANCERS.items() if b.charges])
def test_injected_gradient_is_that_of_the_term_in_the_loss(name, router):
    model = TinyMoE(BALANCERS[name], router)
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
    balancing = Balancing(layer.balancer, {"layer": layer})
    logits = hidden(24)[:, :EXPERTS].requires_grad_()

    def run(rows, weight=None):
        z = logits[rows]
        top = z.detach().topk(TOP_K).indices
        return layer.inject(z.gather(-1, top), z, top, weight=weight)

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


# --- counting: once, and only what trains -----------------------------------------------------


@contextmanager
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x, mask):
        return checkpoint(self.inner, x, mask, use_reentrant=self.reentrant)


def compiled(module, backend="aot_eager"):
    return torch.compile(module, backend=backend, fullgraph=True)


MODES = {
    "plain": lambda model: model,
    "reentrant": lambda model: Checkpointed(model, reentrant=True),
    "non-reentrant": lambda model: Checkpointed(model, reentrant=False),
    "nested": lambda model: Checkpointed(Checkpointed(model, reentrant=False), reentrant=True),
    "compiled": compiled,
    "inductor": lambda model: compiled(model, "inductor"),
    "checkpoint-in-compiled": lambda model: compiled(Checkpointed(model, reentrant=False)),
    "compiled-in-non-reentrant": lambda model: Checkpointed(compiled(model), reentrant=False),
    "compiled-in-reentrant": lambda model: Checkpointed(compiled(model), reentrant=True),
}


def expected_sums(model, batches):
    """Sums over micro-batches, taken outside of any graph."""
    logits = torch.cat([x @ model.gate.mT for x, _ in batches]).view(-1, EXPERTS).detach()
    mask = torch.cat([mask for _, mask in batches]).view(-1)
    return measure(plain_top_k(logits, TOP_K, mask=mask))


def padded_batches():
    batches = []
    for seed in (1, 2):
        mask = torch.ones(2, 8, dtype=torch.bool)
        mask[1, 8 - 3 * seed :] = False
        batches.append((hidden(2, 8, seed=seed).requires_grad_(), mask))
    return batches


@pytest.mark.parametrize(
    ("mode", "balancer"),
    [(mode, PHI) for mode in MODES]
    # One case is enough for the slow compiler.
    + [(mode, SwitchLoss(strength=0.1)) for mode in MODES if mode != "inductor"],
    ids=lambda value: value if isinstance(value, str) else method_name(value),
)
def test_each_batch_is_counted_and_charged_exactly_once(mode, balancer):
    model, twin = TinyMoE(balancer), TinyMoE(balancer)
    batches = padded_batches()
    with fresh_compiler():
        run = MODES[mode](model)
        for x, mask in batches:
            run(x, mask).mean().backward()
            twin(x, mask).mean().backward()
    close([model.gate.grad, model.experts.grad], [twin.gate.grad, twin.experts.grad])
    sums = model.router.commit()
    close(tensors(sums), tensors(expected_sums(model, batches)))
    assert model.router.last_step.tolist() == [sums.tokens.item(), 2]


@pytest.mark.parametrize(
    "balancer",
    [LossFree(rate=0.1), QuantileBalancing(bins=32), Together(PHI, LossFree(rate=0.1))],
    ids=method_name,
)
def test_compiled_training_follows_eager_training_from_step_to_step(balancer):
    eager, fast = TinyMoE(balancer), TinyMoE(balancer)
    with fresh_compiler():
        run = compiled(fast)
        for seed in range(3):
            x = hidden(16, seed=seed)
            for model, call in ((eager, eager), (fast, run)):
                call(x).mean().backward()
                model.router.commit()
    close([fast.gate.grad], [eager.gate.grad])
    close(tensors(fast.router.state), tensors(eager.router.state))
    assert any(tensor.any() for tensor in tensors(eager.router.state))


@pytest.mark.parametrize("mode", ["plain", "compiled", "non-reentrant"])
def test_nothing_is_counted_in_evaluation_or_without_gradient(mode):
    model = TinyMoE()
    x, mask = padded_batches()[0]
    with fresh_compiler():
        run = MODES[mode](model)
        with torch.no_grad():
            run(x, mask)
        run.eval()
        model.eval()
        run(x, mask).mean().backward()
    assert not model.router.running.any()


def test_nothing_is_counted_before_backward():
    model = TinyMoE()
    model(hidden(16))
    assert not model.router.running.any()


def test_padding_is_not_counted_and_gets_no_gradient_of_the_term():
    router = BalancedRouter(PHI, EXPERTS, TOP_K)
    logits = hidden(10)[:, :EXPERTS].requires_grad_()
    mask = torch.arange(10) < 7
    weights, _ = router(logits, mask)
    (0 * weights).sum().backward()
    assert not logits.grad[7:].any()
    assert logits.grad[:7].any()
    assert router.commit().tokens == 7


def test_a_mask_of_integers_means_the_same_as_one_of_booleans():
    mask = torch.arange(16) < 9
    sums = []
    for kind in (torch.bool, torch.int64, torch.float32):
        model = TinyMoE()
        model(hidden(16), mask.to(kind)).mean().backward()
        sums.append(model.router.commit())
    assert same(sums[0], sums[1])
    assert same(sums[0], sums[2])


@pytest.mark.parametrize("mode", ["plain", "compiled"])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["usual", "backward-inside"])
def test_counts_stay_exact_under_autocast(mode, backward_inside):
    model = TinyMoE()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, EXPERTS, generator=generator).requires_grad_()
    mask = torch.rand(3000, generator=generator) > 0.3
    autocast = torch.autocast("cpu", torch.bfloat16)
    with fresh_compiler():
        run = MODES[mode](model.router)
        with autocast:
            loss = run(logits, mask)[0].float().square().mean()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
    expected = measure(plain_top_k(logits.detach(), TOP_K, mask=mask))
    close(tensors(model.router.commit()), tensors(expected))


def test_differentiating_twice_leaves_no_graph_behind_in_the_sums():
    model = TinyMoE()
    x = hidden(16).requires_grad_()
    (slope,) = torch.autograd.grad(model(x).mean(), x, create_graph=True)
    slope.square().sum().backward()
    assert not model.router.running.requires_grad


def test_counting_by_hand_adds_to_the_running_step():
    layer = LayerBalance(LossFree(rate=0.1), EXPERTS)
    routing = plain_top_k(hidden(8)[:, :EXPERTS], TOP_K)
    layer.count(layer.balancer.observe(layer.state, routing))
    layer.count(layer.balancer.observe(layer.state, routing))
    assert layer.commit().tokens == 16
    assert layer.price.any()
    assert not layer.running.any()


# --- where the state lives --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phi-negative-entropy", "phi-and-loss-free", "quantile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_the_model_to_another_dtype_leaves_state_and_sums_float32(name, dtype):
    model = TinyMoE(BALANCERS[name])
    balancing = warm(model)
    before = [t.clone() for t in tensors(model.router.state)]
    model.to(dtype)
    kept = [*tensors(model.router.state), model.router.running, model.router.last_step]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert same(tensors(model.router.state), before)

    model(hidden(16).to(dtype)).float().mean().backward()
    balancing.step()
    assert {tensor.dtype for tensor in tensors(model.router.state)} == {torch.float32}
    assert model.gate.grad.dtype == dtype


def test_half_bfloat16_and_double_leave_the_state_float32():
    for move in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        router = move(BalancedRouter(Together(PHI, LossFree()), EXPERTS, TOP_K))
        assert all(tensor.dtype == torch.float32 for tensor in router.buffers())


def test_a_router_built_under_another_default_dtype_keeps_float32_state():
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = BalancedRouter(Together(PHI, LossFree()), EXPERTS, TOP_K)
    finally:
        torch.set_default_dtype(torch.float32)
    kept = [*router.buffers(), router.running, router.loss_scale]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_a_double_model_trains():
    model = TinyMoE().double()
    balancing = handle(model)
    x = hidden(16).double()
    found = gradients(model, model(x).mean())
    close(found, explicit(model, x), 1e-7)
    balancing.step()


def test_a_state_made_on_the_meta_device_is_not_taken_for_zeros():
    with torch.device("meta"):
        router = BalancedRouter(PHI, EXPERTS, TOP_K)
    with pytest.raises(RuntimeError, match="created on the meta device"):
        router.to_empty(device="cpu")


def test_running_sums_are_neither_buffers_nor_saved():
    model = TinyMoE()
    model(hidden(16)).mean().backward()
    running = model.router.running
    assert all(buffer.data_ptr() != running.data_ptr() for buffer in model.buffers())
    assert set(model.router.state_dict()) == {"state_mean", "state_weight", "last_step"}


def test_a_copied_model_balances_on_its_own():
    model = TinyMoE()
    warm(model)
    twin = copy.deepcopy(model)
    assert same(list(twin.buffers()), list(model.buffers()))
    before = [buffer.clone() for buffer in model.buffers()]
    twin(hidden(16)).mean().backward()
    assert not model.router.running.any()
    twin.router.commit()
    assert same(list(model.buffers()), before)
    assert not same(list(twin.buffers()), before)


def test_a_pickled_model_balances_on():
    model = TinyMoE(Together(PHI, LossFree()))
    warm(model)
    twin = pickle.loads(pickle.dumps(model))
    for each in (model, twin):
        each(hidden(16)).mean().backward()
        each.router.commit()
    assert same(twin.router.state, model.router.state)


def test_the_models_own_checkpoint_carries_the_state():
    model, other = TinyMoE(), TinyMoE(seed=1)
    warm(model)
    other.load_state_dict(model.state_dict())
    assert same(list(other.buffers()), list(model.buffers()))


@pytest.mark.parametrize("name", BALANCERS)
def test_interrupted_training_is_uninterrupted_training_bit_for_bit(name):
    def train(model, balancing, steps):
        optimizer = torch.optim.SGD([model.gate, model.experts], lr=0.1)
        for step in steps:
            for half in hidden(2, 8, seed=step):
                (balancing.follow(model(half).mean()) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            balancing.step()

    through = TinyMoE(BALANCERS[name])
    whole = handle(through)
    train(through, whole, range(4))

    first = TinyMoE(BALANCERS[name])
    before = handle(first)
    train(first, before, range(2))
    saved = copy.deepcopy(before.state_dict())
    second = TinyMoE(BALANCERS[name], seed=9)
    with torch.no_grad():
        second.gate.copy_(first.gate)
        second.experts.copy_(first.experts)
    after = handle(second)
    after.load_state_dict(saved)
    assert after.steps == 2
    train(second, after, range(2, 4))

    assert torch.equal(second.gate, through.gate)
    assert same(list(second.router.buffers()), list(through.router.buffers()))
    assert after.state_dict()["steps"] == whole.state_dict()["steps"] == 4


def test_a_saved_state_is_a_snapshot():
    model = TinyMoE()
    balancing = warm(model)
    saved = balancing.state_dict()
    frozen = copy.deepcopy(saved)
    model(hidden(16)).mean().backward()
    balancing.step()
    assert same(list(saved["layers"]["router"].values()), list(frozen["layers"]["router"].values()))


def test_loading_forgets_what_was_counted_since():
    model = TinyMoE()
    balancing = warm(model)
    saved = balancing.state_dict()
    model(hidden(16)).mean().backward()
    balancing.load_state_dict(saved)
    assert not model.router.running.any()


def two_layers(balancer=PHI, experts=EXPERTS, names=("a", "b")):
    return Balancing(balancer, {name: LayerBalance(balancer, experts, name=name) for name in names})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(format=99), "format 99"),
        (lambda s: s.pop("layers"), "'layers'"),
        (lambda s: s.pop("format"), "'format'"),
        (lambda s: s.update(two_layers(SwitchLoss()).state_dict()), "SwitchLoss"),
        (lambda s: s.update(two_layers(Together(PHI, LossFree())).state_dict()), "Together"),
        (lambda s: s.update(two_layers(names=("a", "c")).state_dict()), "'b'.*'c'"),
        (lambda s: s.update(two_layers(experts=8).state_dict()), "does not fit a"),
    ],
    ids=["format", "no-layers", "no-format", "method", "composition", "layers", "experts"],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, words):
    balancing = two_layers()
    for layer in balancing.layers.values():
        layer.count(measure(plain_top_k(hidden(8)[:, :EXPERTS], TOP_K)))
    balancing.step()
    before = copy.deepcopy(balancing.state_dict())
    bad = two_layers().state_dict()
    change(bad)
    with pytest.raises(ValueError, match=words):
        balancing.load_state_dict(bad)
    after = balancing.state_dict()
    assert after["steps"] == before["steps"] == 1
    for name in ("a", "b"):
        assert same(list(after["layers"][name].values()), list(before["layers"][name].values()))


def test_other_hyper_parameters_of_the_same_method_are_continued_with_a_warning(caplog):
    balancing = two_layers(PhiBalancing(strength=0.2))
    with caplog.at_level(logging.WARNING, "moebalance"):
        balancing.load_state_dict(two_layers(PHI).state_dict())
    assert "strength=0.1" in caplog.text
    assert "strength=0.2" in caplog.text


# --- the handle -------------------------------------------------------------------------------


def test_a_step_without_tokens_names_the_layers_that_saw_none():
    balancing = two_layers()
    balancing.layers["a"].count(measure(plain_top_k(hidden(8)[:, :EXPERTS], TOP_K)))
    with pytest.raises(RuntimeError, match=r"in b during step 1\b"):
        balancing.step()
    assert balancing.steps == 0
    assert not balancing.layers["a"].running.any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_bad_logits_are_refused_by_layer_and_step_and_do_no_harm(poison):
    model = TinyMoE()
    balancing = warm(model)
    before = [buffer.clone() for buffer in model.buffers()]
    x = hidden(16)
    x[3] = poison
    model(x).mean().backward()
    with pytest.raises(FloatingPointError, match=r"in router during step 3\b"):
        balancing.step()
    assert same(list(model.buffers()), before)
    model.zero_grad()
    model(hidden(16)).mean().backward()
    balancing.step()
    assert balancing.steps == 3
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


def test_metrics_are_those_of_the_last_step_by_hand():
    a, b = LayerBalance(LossFree(rate=0.5), 4), LayerBalance(LossFree(rate=0.5), 4)
    balancing = Balancing(a.balancer, {"a": a, "b": b})
    assert balancing.metrics() == {}
    assert balancing.loads() == {}
    # Layer a: counts 3, 3, 1, 1 of four tokens and top-2; layer b: 4, 2, 2, 0.
    chosen = {"a": [[0, 1], [0, 1], [0, 1], [2, 3]], "b": [[0, 1], [0, 1], [0, 2], [0, 2]]}
    for name, layer in balancing.layers.items():
        layer.count(measure(route(torch.zeros(4, 4), torch.tensor(chosen[name]), Softmax())))
    balancing.step()

    def entropy(counts):
        return -sum(c / 8 * math.log(c / 8) for c in counts if c) / math.log(4)

    expected = {
        "maxvio": (0.5 + 1.0) / 2,
        "maxvio_worst": 1.0,
        "minvio": (0.5 + 1.0) / 2,
        "cv": (0.5 + math.sqrt(0.5)) / 2,
        "gini": (0.25 + 0.375) / 2,
        "entropy": (entropy([3, 3, 1, 1]) + entropy([4, 2, 2, 0])) / 2,
        "dead": (0 + 0.25) / 2,
        "soft_maxvio": 0.0,
        "soft_hard_gap": (0.25 + 0.25) / 2,
        "price_spread": 1.0,
        "tokens": 4.0,
    }
    assert balancing.metrics() == pytest.approx(expected, abs=1e-6)
    hard, soft = balancing.loads()["b"]
    assert hard.tolist() == [0.5, 0.25, 0.25, 0]
    assert soft.tolist() == [0.25] * 4


def test_methods_without_selection_price_report_no_price_spread():
    model = TinyMoE()
    assert "price_spread" not in warm(model).metrics()


def test_the_first_step_says_once_what_is_balanced_and_how(caplog):
    model = TinyMoE()
    with caplog.at_level(logging.INFO, "moebalance"):
        balancing = warm(model)
    (record,) = [r for r in caplog.records if r.name == "moebalance"]
    message = record.getMessage()
    assert repr(PHI) in message
    assert "1 routers (first: 4 experts, Softmax())" in message
    assert "16 tokens" in message
    assert f"MaxVio {metrics.max_violation(first_load()).item():.2f}" in message
    assert repr(balancing) == f"Balancing({PHI!r}, layers=1, steps=2)"


def first_load():
    model = TinyMoE()
    return measure(plain_top_k((hidden(16, seed=50) @ model.gate.mT).detach(), TOP_K)).counts


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: BalancedRouter(PHI, 4, 5), ValueError, "top_k=5 with num_experts=4"),
        (lambda: BalancedRouter(PHI, 4, 0), ValueError, "top_k=0"),
        (lambda: BalancedRouter(PHI, 1, 1), ValueError, "num_experts=1"),
        (lambda: BalancedRouter("phi", 4, 2), TypeError, "balancer='phi'"),
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
