"""A router that is ours: its node's fused form against the plain one."""

from __future__ import annotations

import pytest
import torch

from cases import METHODS, commit, random_logits, tensors
from moebalance import (
    BalancedRouter,
    LossFree,
    PhiBalancing,
    Sigmoid,
    Softmax,
    SwitchLoss,
    Together,
)
from moebalance.core.packing import packed_size
from moebalance.core.state import method_name
from moebalance.gates import Gate
from moebalance.routing import Batch

TOKENS, EXPERTS, TOP_K = 33, 12, 3

FROM_SUMS = {name: b for name, b in METHODS.items() if b.traits.from_sums}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_from_sums_if_it_charges_one_price_that_the_sums_give(name):
    method = METHODS[name]
    state = method.init(EXPERTS)
    scores = torch.rand(EXPERTS)
    routing = None  # what a router of ours hands over
    sums = method_sums(method, scores)
    if method.traits.from_sums:
        price = method.loss_price(state, Batch(routing, sums, sums, 0.5))
        assert price is None or price.shape == (EXPERTS,)
    else:
        assert name.startswith(("sequence", "quantile", "sinkhorn", "z-loss", "switch-z"))


def method_sums(method, scores):
    from moebalance.core.packing import unpack

    packed = torch.ones(packed_size(method, EXPERTS))
    packed[:EXPERTS] = scores
    return unpack(packed, method, EXPERTS)


def trained(
    method, gate: Gate, *, normalize: bool, fused: bool, dtype: torch.dtype, padded: bool
) -> dict[str, list[torch.Tensor]]:
    """Two steps of two batches through one router, and all that it gave and kept."""
    router = BalancedRouter(method, EXPERTS, TOP_K, gate=gate, normalize=normalize, fused=fused)
    seen: dict[str, list[torch.Tensor]] = {"weights": [], "experts": [], "gradients": []}
    for seed in range(4):
        # No two alike in a row, in bfloat16 either: top-k may break a tie as it likes.
        order = random_logits(TOKENS, EXPERTS, seed=seed).argsort(dim=-1)
        logits = torch.linspace(-2, 2, EXPERTS)[order].to(dtype).requires_grad_()
        mask = torch.arange(TOKENS) % 4 > 0 if padded else None
        weights, experts = router(logits, mask)
        # The experts of a token are named in any order: all is told by expert.
        upstream = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
        weights.backward(upstream.to(dtype).gather(-1, experts) / TOKENS)
        experts, order = experts.sort(dim=-1)
        seen["weights"].append(weights.detach().gather(-1, order))
        seen["experts"].append(experts)
        seen["gradients"].append(logits.grad)
        if seed % 2:
            commit(router)
    seen["state"] = [*tensors(router.state), router.last_step]
    return seen


FEW = [
    PhiBalancing(strength=0.5),
    PhiBalancing(strength=0.5, peek=False),
    SwitchLoss(strength=0.5),
    LossFree(speed=0.05),
    Together(PhiBalancing(strength=0.5), LossFree(speed=0.05)),
]


@pytest.mark.parametrize("padded", [False, True], ids=["all real", "padded"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("method", FEW, ids=method_name)
def test_fused_training_is_plain_training(method, gate, normalize, padded, interpreted):
    how = {"normalize": normalize, "dtype": torch.float32, "padded": padded}
    fused = interpreted(trained, method, gate, fused=True, **how)
    plain = trained(method, gate, fused=False, **how)
    for name, expected in plain.items():
        for a, b in zip(fused[name], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if name == "state" else 1e-7)


def test_fused_training_in_bfloat16_is_plain_training(interpreted):
    how = {"normalize": True, "dtype": torch.bfloat16, "padded": True}
    fused = interpreted(trained, FEW[0], Softmax(), fused=True, **how)
    plain = trained(FEW[0], Softmax(), fused=False, **how)
    for a, b in zip(fused["gradients"], plain["gradients"], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).abs().max() < 8e-3 * b.abs().max()  # two roundings to bfloat16
    for a, b in zip(fused["state"], plain["state"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def node_of(fused: bool) -> str:
    router = BalancedRouter(FEW[0], EXPERTS, TOP_K, fused=fused)
    weights, _ = router(torch.randn(5, EXPERTS, requires_grad=True))
    return str(weights.grad_fn.next_functions[0][0].name()) + weights.grad_fn.name()


def test_the_fused_form_is_taken_where_it_runs_and_off_by_one_keyword(interpreted):
    """The control of the tests above: they compare two different nodes."""
    assert "_ChooseFused" in interpreted(node_of, fused=True)
    assert "_ChooseBackward" in interpreted(node_of, fused=False)
    assert "_ChooseBackward" in node_of(fused=True)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()])
def test_a_backward_inside_an_autocast_region_is_as_exact_as_outside(gate: Gate, attached: bool):
    """A price formed in bfloat16 would be off by three digits after the second."""

    def gradient(*, inside: bool) -> torch.Tensor:
        layer = BalancedRouter(PhiBalancing(strength=1.0), 16, 2, gate=gate)
        logits = random_logits(64, 16, seed=3).requires_grad_()
        if attached:
            chosen, experts = gate.affinities(logits).topk(2)
            weights = layer.tie(chosen, logits, experts)
        else:
            weights, _ = layer(logits)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            weights.sum().backward()
        assert logits.grad is not None
        return logits.grad

    torch.testing.assert_close(gradient(inside=True), gradient(inside=False), rtol=0, atol=1e-7)
