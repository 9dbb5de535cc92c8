"""Under torch.compile: one graph, however often the price moves, and memory that stays in place."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

import moebalance as mb
from moebalance import (
    LossFree,
    NegativeEntropy,
    PhiBalancing,
    SequenceLoss,
    SwitchLoss,
    Together,
    ZLoss,
)
from moebalance.core.state import method_name
from tiny_moe import TinyMoE, close, gradients, handle, hidden

# torch.compile's own: Dynamo instantiates the functions that it traces.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",
)

every_router = pytest.mark.parametrize("router", ["softmax-normalised", "top-k-then-softmax"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@every_router
@pytest.mark.parametrize(
    "method",
    [
        PhiBalancing(strength=0.1),
        PhiBalancing(strength=0.1, peek=False),
        LossFree(speed=0.1),
        SequenceLoss(strength=0.1),
        Together(
            SwitchLoss(strength=0.1, proportions=(2, 1, 1, 1)), LossFree(proportions=(2, 1, 1, 1))
        ),
        PhiBalancing(
            NegativeEntropy().grouped((0, 1, 1, 0)) + NegativeEntropy().relative_to((3, 1, 2, 1)),
            strength=0.1,
        ),
        Together(PhiBalancing(strength=0.1), LossFree(speed=0.1)),
    ],
    ids=method_name,
)
def test_a_price_that_moves_compiles_nothing_anew(method, router):
    model = TinyMoE(method, router)
    balancing, run = handle(model), compiled(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            run(hidden(1, 16, seed=seed)).mean().backward()
            balancing.step()


@every_router
@pytest.mark.parametrize("method", [PhiBalancing, ZLoss])
def test_another_strength_in_one_process_is_charged_as_it_is(method, router):
    for strength in (0.1, 0.2, 0.4):
        eager = TinyMoE(method(strength=strength), router)
        fast = TinyMoE(method(strength=strength), router)
        run = compiled(fast)
        found = gradients(fast, run(hidden(16)).mean())
        close(found, gradients(eager, eager(hidden(16)).mean()))


@every_router
def test_what_a_graph_holds_on_to_stays_in_place(router):
    """Captured graphs, of the compiler or of CUDA, read and write these very addresses."""
    model = TinyMoE(Together(PhiBalancing(), LossFree()), router)
    balancing, layer = handle(model), model.router

    def addresses() -> list[int]:
        held = [*layer.buffers(), layer.running, layer.loss_scale]
        return [tensor.data_ptr() for tensor in held]

    before = addresses()
    for seed in range(3):
        balancing.follow(model(hidden(16, seed=seed)).mean()).backward()
        balancing.step()
    balancing.load_state_dict(balancing.state_dict())
    assert addresses() == before


@pytest.mark.parametrize("gate", [mb.Softmax(), mb.Sigmoid()], ids=repr)
@pytest.mark.parametrize(
    "method", [mb.PhiBalancing(), mb.NoBalancing(), mb.recommended()], ids=repr
)
def test_a_router_runs_on_fake_tensors_that_estimate_memory(method, gate):
    """Nothing is read that only a real tensor has, in either direction."""
    with FakeTensorMode():
        router = mb.BalancedRouter(method, 8, 2, gate=gate)
        logits = torch.randn(16, 8, requires_grad=True)
        weights, experts = router(logits)
        weights.sum().backward()
        assert logits.grad.shape == (16, 8)
        assert experts.shape == (16, 2)
