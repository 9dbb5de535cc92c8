"""Every batch that trains is counted and charged exactly once, however the model is run."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import commit, plain_top_k, tensors
from moebalance import BalancedRouter, LossFree, QuantileBalancing, SwitchLoss, Together
from moebalance.core.layer import LayerBalance
from moebalance.core.state import method_name
from moebalance.methods import observe
from moebalance.routing import measure
from tiny_moe import EXPERTS, PHI, TOP_K, TinyMoE, close, hidden, same

# torch.compile's own: Dynamo instantiates the functions that it traces, inductor uses torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


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
    ("mode", "method"),
    [(mode, PHI) for mode in MODES]
    # One case is enough for the slow compiler.
    + [(mode, SwitchLoss(strength=0.1)) for mode in MODES if mode != "inductor"],
    ids=lambda value: value if isinstance(value, str) else method_name(value),
)
def test_each_batch_is_counted_and_charged_exactly_once(mode, method):
    model, twin = TinyMoE(method), TinyMoE(method)
    batches = padded_batches()
    with fresh_compiler():
        run = MODES[mode](model)
        for x, mask in batches:
            run(x, mask).mean().backward()
            twin(x, mask).mean().backward()
    close([model.gate.grad, model.experts.grad], [twin.gate.grad, twin.experts.grad])
    sums = commit(model.router)
    close(tensors(sums), tensors(expected_sums(model, batches)))
    assert model.router.last_step.tolist() == [sums.tokens.item(), 2]


@pytest.mark.parametrize(
    "method",
    [LossFree(speed=0.1), QuantileBalancing(bins=32), Together(PHI, LossFree(speed=0.1))],
    ids=method_name,
)
def test_compiled_training_follows_eager_training_from_step_to_step(method):
    eager, fast = TinyMoE(method), TinyMoE(method)
    with fresh_compiler():
        run = compiled(fast)
        for seed in range(3):
            x = hidden(16, seed=seed)
            for model, call in ((eager, eager), (fast, run)):
                call(x).mean().backward()
                commit(model.router)
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
    assert commit(router).tokens == 7


def test_a_mask_of_integers_means_the_same_as_one_of_booleans():
    mask = torch.arange(16) < 9
    sums = []
    for kind in (torch.bool, torch.int64, torch.float32):
        model = TinyMoE()
        model(hidden(16), mask.to(kind)).mean().backward()
        sums.append(commit(model.router))
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
    close(tensors(commit(model.router)), tensors(expected))


def test_a_second_derivative_is_refused_and_leaves_no_graph_behind_in_the_sums():
    model = TinyMoE()
    x = hidden(16).requires_grad_()
    (slope,) = torch.autograd.grad(model(x).mean(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        slope.square().sum().backward()
    assert not model.router.running.requires_grad


def test_counting_by_hand_adds_to_the_running_step():
    layer = LayerBalance(LossFree(speed=0.1), EXPERTS)
    routing = plain_top_k(hidden(8)[:, :EXPERTS], TOP_K)
    layer.count(observe(layer.method, layer.state, routing))
    layer.count(observe(layer.method, layer.state, routing))
    assert commit(layer).tokens == 16
    assert layer.price.any()
    assert not layer.running.any()
