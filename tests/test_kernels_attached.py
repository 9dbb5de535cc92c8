"""What is attached to another's router, fused: programs and node against the plain ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import skewed_state
from families import tiny
from moebalance import (
    BalancedRouter,
    LossFree,
    PhiBalancing,
    SequenceLoss,
    Sigmoid,
    Softmax,
    SwitchLoss,
    attach,
    kernels,
)
from moebalance.core.layer import LayerBalance
from moebalance.core.packing import pack
from moebalance.kernels import attached
from moebalance.lab.bench.traffic import traffic
from moebalance.routing import measure, route

GATES = [Softmax(), Sigmoid()]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@settings(max_examples=40)
@given(st.data())
def test_any_batch_is_counted_and_charged_as_in_torch(interpreted, data):
    draw = data.draw
    experts = draw(st.sampled_from([2, 8, 60, 64, 160, 320, 2304]))
    top_k = draw(st.integers(1, min(experts, 32)))
    tokens, beside = draw(st.integers(0, 20)), draw(st.integers(0, 5))
    gate, dtype = draw(st.sampled_from(GATES)), draw(st.sampled_from(list(TOLERANCE)))
    torch.manual_seed(draw(st.integers(0, 10)))
    logits = torch.randn(tokens, experts + beside).to(dtype)[:, :experts]
    chosen = torch.rand(tokens, experts).topk(top_k).indices
    mask = torch.rand(tokens) < 0.7 if draw(st.booleans()) else None
    charge = torch.randn(experts)
    counted, gradient = interpreted(both, logits, chosen, gate, charge, mask)

    routing = route(logits.double(), chosen, gate, mask=mask)
    close(counted, pack(measure(routing)), 1e-5)
    assert torch.equal(counted[experts:].double(), pack(measure(routing))[experts:])
    expected = kernels.plain.pull(routing.logits, gate, charge.double(), mask=mask)
    assert gradient.dtype == dtype
    assert gradient.is_contiguous()
    close(gradient, expected, TOLERANCE[dtype])


def test_what_padding_holds_reaches_nothing(interpreted):
    logits = torch.randn(9, 60)
    logits[4], logits[7, 3] = torch.nan, torch.inf
    mask = torch.ones(9, dtype=torch.bool)
    mask[4] = mask[7] = False
    chosen, charge = torch.rand(9, 60).topk(4).indices, torch.randn(60)
    counted, gradient = interpreted(both, logits, chosen, Softmax(), charge, mask)
    alone, _ = interpreted(both, logits[mask], chosen[mask], Softmax(), charge, None)
    assert torch.equal(counted, alone)
    assert (gradient[~mask] == 0).all()
    assert gradient.isfinite().all()


def test_an_index_that_names_no_expert_is_counted_nowhere(interpreted):
    logits, chosen = torch.randn(9, 60), torch.rand(9, 60).topk(4).indices
    chosen[3, 1], chosen[5, 0], chosen[6, 2] = 60, -1, 1000
    counted, _ = interpreted(both, logits, chosen, Softmax(), torch.zeros(60), None)
    named = chosen[(chosen >= 0) & (chosen < 60)]
    assert torch.equal(counted[60:120], torch.bincount(named, minlength=60).float())


METHODS = {
    "phi": PhiBalancing(strength=0.3),
    "phi-no-peek": PhiBalancing(strength=0.3, peek=False),
    "switch": SwitchLoss(),  # its price is formed in torch
    "loss-free": LossFree(),  # it charges nothing
}


@pytest.mark.parametrize("weighed", [False, True], ids=["", "weighed"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_step_of_two_batches_is_that_of_the_plain_node(method, padded, weighed, interpreted):
    mask = torch.arange(33) < 20 if padded else None
    weight = torch.tensor(0.6) if weighed else None
    case = (method, torch.randn(2, 33, 60), mask, weight)
    for found, plain in zip(
        interpreted(two_batches, *case, fused=True), two_batches(*case, fused=False), strict=True
    ):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6 * plain.abs().max().item())


def sent_for_a_batch(layer, monkeypatch) -> list[str]:
    """Launches and kernels of the way back of one batch, in order."""
    sent: list[str] = []

    def launch(program, *_, **options):
        sent.append(program.name)

    monkeypatch.setattr(kernels, "supported", lambda *_: True)
    monkeypatch.setattr(attached, "launch", launch)
    logits = torch.randn(32, 64, requires_grad=True)
    experts = logits.detach().topk(8).indices
    carrier, upstream = torch.ones(32, 8, requires_grad=True), torch.ones(32, 8)

    def batch() -> object:
        carried = layer.tie(carrier, logits, experts)
        return torch.autograd.grad(carried, [carrier, logits], upstream)

    seen = traffic(batch, rows=1)
    assert not seen.small
    return sent[len(sent) // 2 :] + seen.large  # the first of two runs is to warm up


def test_two_launches_are_all_that_phi_sends_a_gpu(monkeypatch):
    """Of ours; the clone is the carrier, in forward."""
    found = sent_for_a_batch(LayerBalance(PhiBalancing(), 64), monkeypatch)
    assert found == ["attached_programs.count", "attached_programs.pull", "aten::clone"]


@pytest.mark.parametrize(
    "layer",
    [LayerBalance(PhiBalancing(), 64, fused=False), LayerBalance(SequenceLoss(), 64)],
    ids=["switched off", "not from sums alone"],
)
def test_other_methods_and_one_keyword_leave_it_to_torch(layer, monkeypatch):
    assert not any("programs" in name for name in sent_for_a_batch(layer, monkeypatch))


def test_attach_switches_it_off_by_one_keyword():
    model = torch.nn.Sequential(BalancedRouter(PhiBalancing(), 8, 2))
    assert all(layer.fused for layer in attach(model).layers.values())
    assert not any(layer.fused for layer in attach(model, fused=False).layers.values())
    peer = tiny("qwen3_moe")
    with attach(peer, PhiBalancing()) as balancing:
        assert all(layer.fused for layer in balancing.layers.values())
    with attach(peer, PhiBalancing(), fused=False) as balancing:
        assert not any(layer.fused for layer in balancing.layers.values())


def both(logits, experts, gate, charge, mask):
    counted = kernels.count(logits, experts, gate, mask=mask)
    return counted, kernels.pull(logits, gate, charge, mask=mask)


def two_batches(method, batches, mask, weight, *, fused):
    """Gradients of the logits, and the running sums, of two batches of one step."""
    layer = LayerBalance(method, 60, fused=fused)
    layer._write(skewed_state(method, 60))
    layer.loss_scale.fill_(0.7)
    found = []
    for batch in batches:
        logits = batch.clone().requires_grad_()
        experts = batch.topk(4).indices
        carrier = logits.softmax(dim=-1).gather(1, experts)
        carried = layer.tie(carrier, logits, experts, mask=mask, weight=weight)
        found += torch.autograd.grad(carried.square().sum(), logits)
    return [*found, layer.running]


def close(found, wanted, tolerance):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)
