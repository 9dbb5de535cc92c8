"""Padding, sequences and packed text of named routers, read from the model's call."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import moebalance as mb
from named_models import EXPERTS, TOP_K, WIDTH, Layer, Model, attach, padded


@pytest.mark.parametrize("recompute", [False, True])
def test_padding_is_counted_neither_in_forward_order_nor_in_recomputation(recompute):
    """Two forwards before two backwards: each backward has its own mask."""
    x, mask = padded()
    model = Model(Layer(), recompute=recompute)
    balancing = attach(model, mask="mask")
    halves = zip(x.chunk(2), mask.chunk(2), strict=True)
    losses = [model(part, real)[real].sum() for part, real in halves]
    for loss in losses:
        loss.backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == mask.sum()
    logits = model.layers[0].gate(x[mask])
    counts = torch.bincount(logits.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
    hard, _ = balancing.loads()["layers.0.gate"]
    torch.testing.assert_close(hard, counts / counts.sum())


def test_a_mask_that_is_additive_or_of_other_tokens_is_refused():
    x, mask = padded()
    model = Model(Layer())
    attach(model, mask="mask")
    additive = torch.zeros(4, 16).masked_fill(~mask, float("-inf"))
    with pytest.raises(ValueError, match=r"additive .*give mask == 0"):
        model(x, additive)
    with pytest.raises(ValueError, match=r"64 tokens under mask of shape \(4, 8\)"):
        model(x, mask[:, :8])
    with pytest.raises(TypeError, match="must be a tensor"):
        model(x, "mask")


def test_a_model_that_takes_a_mask_is_told_how_to_name_it(caplog):
    with caplog.at_level(logging.WARNING, "moebalance"):
        attach(Model(Layer()))
    assert "mask='mask'" in caplog.text


def test_sequences_are_read_from_the_tokens_that_the_model_is_called_with():
    method = mb.SequenceLoss(1.0)
    model = Model(Layer())
    balancing = attach(model, method=method)
    x, _ = padded()
    (balancing.follow(0 * model(x).sum())).backward()
    logits = model.layers[0].gate(x).detach().requires_grad_()
    router = mb.BalancedRouter(method, EXPERTS, TOP_K)
    with mb.attach(router):
        (0 * router(logits)[0].sum()).backward()
    expected = torch.einsum("bse,bsd->ed", logits.grad, x)
    torch.testing.assert_close(model.layers[0].gate.weight.grad, expected)


class Packed(Model):
    """A model that is told where its packed sequences end."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        return super().forward(x)


BOUNDS = torch.tensor([0, 5, 6, 6, 18])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        mb.SequenceLoss(1.0),
        mb.Together(mb.SequenceLoss(1.0), mb.LossFree(scale="nats")),
        mb.SwitchLoss(1.0),
    ],
    ids=["sequence", "with-a-price", "switch"],
)
def test_packed_text_is_charged_by_its_boundaries_as_by_a_balanced_router(method, recompute):
    """Two batches, the second without the first one's boundaries, and two tokens of padding."""
    torch.manual_seed(0)
    model = Packed(Layer(), recompute=recompute)
    balancing = attach(model, method=method, normalize=True, cu_seqlens="cu_seqlens")
    gate, router = model.layers[0].gate, mb.BalancedRouter(method, EXPERTS, TOP_K)
    batches = [(torch.randn(1, 20, WIDTH), BOUNDS), (torch.randn(1, 20, WIDTH), BOUNDS[:2])]
    losses = [0 * model(x, bounds).sum() for x, bounds in batches]
    expected = torch.zeros_like(gate.weight)
    with mb.attach(router):
        for loss, (x, bounds) in zip(losses, batches, strict=True):
            loss.backward()
            logits = (x[0] @ gate.weight.T).detach().requires_grad_()
            (0 * router(logits, cu_seqlens=bounds)[0]).sum().backward()
            expected += logits.grad.T @ x[0]
    torch.testing.assert_close(gate.weight.grad, expected, rtol=1e-5, atol=1e-7)
    assert expected.abs().max() > 1e-3
    balancing.step()
    assert balancing.metrics()["tokens"] == 18 + 5


def test_boundaries_that_do_not_fit_the_tokens_are_refused():
    model = Packed(Layer())
    attach(model, method=mb.SequenceLoss(1.0), cu_seqlens="cu_seqlens")
    for bounds, error, said in (
        (BOUNDS, ValueError, r"layers\.0\.gate: cu_seqlens from 0 to 18 for 10 tokens"),
        (BOUNDS.float(), ValueError, "give whole numbers"),
        ([0, 10], TypeError, r"cu_seqlens=list: the boundaries must be a tensor"),
    ):
        with pytest.raises(error, match=said):
            model(torch.randn(1, 10, WIDTH), bounds)
    with pytest.raises(ValueError, match=r"cu_seqlens='lengths': Packed\.forward has no such"):
        attach(Packed(Layer()), cu_seqlens="lengths")


def test_a_loss_of_whole_sequences_refuses_rows_without_boundaries():
    layer = Layer()
    attach(layer, "gate", method=mb.SequenceLoss(1.0))
    with pytest.raises(ValueError, match="needs to know where sequences end"):
        layer(torch.randn(10, WIDTH).unsqueeze(0)[0])
