"""Laws of the gates: what leads a price back to the logits agrees with autograd."""

from __future__ import annotations

import pytest
import torch

from cases import random_logits
from moebalance import Sigmoid, Softmax, SqrtSoftplus
from moebalance.gates import Gate

every_gate_in_use = pytest.mark.parametrize(
    "gate", [Softmax(), Sigmoid(), SqrtSoftplus()], ids=lambda gate: type(gate).__name__
)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal relative to the largest entry."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


@every_gate_in_use
@pytest.mark.parametrize("shape", [(5,), (9, 5)], ids=["one price", "a price per token"])
def test_a_gate_leads_any_price_back_through_its_affinities_alone(gate, shape):
    """`price_gradient`, then `backward`: the one derivative, which needs no logits."""
    assert isinstance(gate, Gate)
    logits = random_logits(9, 5, dtype=torch.float64).requires_grad_()
    price = torch.randn(shape, dtype=torch.float64)
    scores = gate.scores(logits)
    (expected,) = torch.autograd.grad((scores * price).sum(), logits)
    affinities = gate.affinities(logits).detach()
    scale = gate.row_scale(affinities)
    same(affinities if scale is None else affinities * scale.unsqueeze(-1), scores.detach())
    found = gate.backward(gate.price_gradient(price, affinities, scale), affinities)
    same(found, expected)


@every_gate_in_use
def test_a_gradient_written_over_the_one_before_it_has_the_same_bits(gate):
    for shape in ((0, 3), (1, 2), (7, 9), (513, 60), (33, 257)):
        affinities, upstream = gate.affinities(torch.randn(shape)), torch.randn(shape)
        expected = gate.backward(upstream, affinities)
        assert torch.equal(gate.backward_over(upstream, affinities), expected)


@every_gate_in_use
def test_affinities_that_underflow_have_finite_gradients(gate):
    logits = torch.tensor([[-200.0, -150.0, -120.0], [-300.0, 0.0, 300.0]])
    affinities = gate.affinities(logits)
    price = torch.tensor([1.0, 0.0, -1.0])
    for upstream in (
        torch.ones(2, 3),
        gate.price_gradient(price, affinities, gate.row_scale(affinities)),
    ):
        assert gate.backward(upstream, affinities).isfinite().all()
