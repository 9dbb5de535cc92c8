"""A two-of-four-experts layer of six inputs that stands for a model, and its expected gradient.

The expected gradient is always that of the explicit term, added to the loss of the same layer
without injection.
"""

from __future__ import annotations

import torch
from torch import nn

from cases import one_batch, tensors
from moebalance import BalancedRouter, Balancing, PhiBalancing, Sigmoid
from moebalance.core.layer import LayerBalance
from moebalance.routing import route

EXPERTS, WIDTH, TOP_K = 4, 6, 2
PHI = PhiBalancing(strength=0.1, rate=0.5, unit="paper")


class TopKThenSoftmax(LayerBalance):
    """A hand-written router: weights are the softmax of the chosen logits."""

    def forward(self, logits, mask=None, sequences=None):
        flat = logits.reshape(-1, self.num_experts)
        flat_mask = None if mask is None else mask.reshape(-1)
        ranked = self.preference(flat, flat_mask, training=self.training)
        experts = (flat.detach() if ranked is None else ranked).topk(TOP_K).indices
        weights = flat.gather(-1, experts).softmax(-1)
        if self.training and torch.is_grad_enabled():
            if sequences is None:
                sequences = logits.shape[0] if logits.dim() == 3 else 1
            weights = self.tie(weights, flat, experts, mask=flat_mask, sequences=sequences)
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
    def __init__(self, method=PHI, router="softmax-normalised", seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gate = nn.Parameter(torch.randn(EXPERTS, WIDTH, generator=generator))
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator) / 3)
        self.router = ROUTERS[router](method)

    def forward(self, x, mask=None):
        rows = None if x.dim() == 3 else 1
        weights, experts = self.router(x @ self.gate.mT, mask, sequences=rows)
        every = torch.einsum("...i,eij->...ej", x, self.experts)
        chosen = every.gather(-2, experts.unsqueeze(-1).expand(*experts.shape, WIDTH))
        return (weights.unsqueeze(-1) * chosen).sum(-2).square().mean(-1)


def hidden(*shape, seed=0):
    """Hidden states that all point somewhat the same way, so that experts are unequally liked."""
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed)) + 0.5


def handle(model) -> Balancing:
    return Balancing(model.router.method, {"router": model.router})


def gradients(model, loss):
    return torch.autograd.grad(loss, [model.gate, model.experts])


def warm(model, steps=2) -> Balancing:
    """A handle on a model that has trained for some steps."""
    balancing = handle(model)
    for seed in range(steps):
        model(hidden(1, 16, seed=50 + seed)).mean().backward()
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
    batch = one_batch(layer.method, layer.state, routing, share)
    loss = model(x, mask).mean() + scale * layer.method.penalty(layer.state, batch)
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
