"""Five MoE layers, written after the interface of those in use, and the line that balances each.

Every layer's gradient is held against the Switch loss written out by hand on its logits.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moebalance as mb

WIDTH, EXPERTS, TOP_K = 12, 4, 2
METHOD = mb.SwitchLoss(0.5)


class Experts(nn.Module):
    """All experts on all tokens, combined by weights (T, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return (torch.einsum("td,edh->teh", x, self.up).relu() * weights.unsqueeze(-1)).sum(1)


def spread(weights: Tensor, chosen: Tensor) -> Tensor:
    """(T, K) weights as (T, E)."""
    return weights.new_zeros(len(weights), EXPERTS).scatter(-1, chosen, weights)


class NanochatLike(nn.Module):
    """A linear router, sigmoid scores, a bias for the choice only; weights not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        scores = torch.sigmoid(self.router(flat).float())
        chosen = scores.topk(TOP_K, dim=-1).indices
        return self.experts(flat, spread(scores.gather(-1, chosen), chosen)).view_as(x)


class MinimindLike(nn.Module):
    """softmax, top-k, divided by the sum plus a small number."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, WIDTH)
        weights, chosen = self.gate(flat).softmax(dim=-1).topk(TOP_K, dim=-1, sorted=False)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return self.experts(flat, spread(weights, chosen)).view_as(x)


class OlmoCoreLike(nn.Module):
    """A router with a flat weight and methods of its own: no module returns the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.experts = nn.Parameter(torch.randn(EXPERTS * WIDTH) / 4), Experts()

    def get_expert_logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.view(EXPERTS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.get_expert_logits(x)
        weights, chosen = logits.softmax(dim=-1).topk(TOP_K, dim=-1)
        flat = weights.view(-1, TOP_K), chosen.view(-1, TOP_K)
        return self.experts(x.view(-1, WIDTH), spread(*flat)).view_as(x)


class StMoeLike(nn.Module):
    """`to_gates`, then a second expert only above a threshold, and room for some tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.to_gates, self.experts = nn.Linear(WIDTH, EXPERTS, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        raw = self.to_gates(x).softmax(dim=-1)  # (B,S,E)
        weights, chosen = raw.topk(TOP_K, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        weights = weights * torch.cat([weights[..., :1] >= 0, weights[..., 1:] > 0.2], dim=-1)
        wanted = F.one_hot(chosen, EXPERTS).sum(-2).cumsum(1)  # (B,S,E)
        weights = weights * (wanted.gather(-1, chosen) <= x.shape[1] * 3 // 4)
        flat = weights.view(-1, TOP_K), chosen.view(-1, TOP_K)
        return self.experts(x.view(-1, WIDTH), spread(*flat)).view_as(x)


class MixtureOfExpertsLike(nn.Module):
    """Gates are an einsum over a parameter, and the second expert is a choice without the first."""

    def __init__(self) -> None:
        super().__init__()
        self.w_gating, self.experts = nn.Parameter(torch.randn(WIDTH, EXPERTS) / 4), Experts()

    def forward(self, x: Tensor) -> Tensor:
        raw = torch.einsum("bnd,de->bne", x, self.w_gating)
        gates = raw.softmax(dim=-1)
        first, one = gates.max(dim=-1)
        second, two = (gates * (1 - F.one_hot(one, EXPERTS))).max(dim=-1)
        total = first + second + 1e-9
        weights, chosen = (
            torch.stack([first, second], -1) / total[..., None],
            torch.stack([one, two], -1),
        )
        flat = weights.view(-1, TOP_K), chosen.view(-1, TOP_K)
        return self.experts(x.view(-1, WIDTH), spread(*flat)).view_as(x)


def nanochat(model: nn.Module) -> mb.Balancing:
    return mb.attach(model, METHOD, routers="*.router", top_k=TOP_K, gate=mb.Sigmoid())


def minimind(model: nn.Module) -> mb.Balancing:
    return mb.attach(model, METHOD, routers="*.gate", top_k=TOP_K)


def st_moe(model: nn.Module) -> mb.Balancing:
    return mb.attach(model, METHOD, routers="*.to_gates", top_k=TOP_K)


def olmo_core(model: nn.Module) -> mb.Balancing:
    return mb.attach(model, METHOD, routers="*.get_expert_logits", top_k=TOP_K, num_experts=EXPERTS)


def mixture_of_experts(model: nn.Module) -> mb.Balancing:
    return mb.attach(model, METHOD, routers="*.w_gating", top_k=TOP_K, num_experts=EXPERTS)


class Counting(OlmoCoreLike):
    """With `CountAndCharge`, for a choice of the layer's own: three lines."""

    def __init__(self) -> None:
        super().__init__()
        self.balance = mb.CountAndCharge(METHOD, EXPERTS)  # new

    def get_expert_logits(self, x: Tensor) -> Tensor:
        logits = super().get_expert_logits(x)
        return self.balance(logits, logits.topk(TOP_K).indices)  # new


LAYERS = {
    "nanochat": (NanochatLike, nanochat, lambda m, x: m.router(x), mb.Sigmoid()),
    "minimind": (MinimindLike, minimind, lambda m, x: m.gate(x), mb.Softmax()),
    "OLMo-core": (OlmoCoreLike, olmo_core, lambda m, x: m.get_expert_logits(x), mb.Softmax()),
    "counting": (Counting, mb.attach, lambda m, x: m.get_expert_logits(x), mb.Softmax()),
    "st-moe-pytorch": (StMoeLike, st_moe, lambda m, x: m.to_gates(x), mb.Softmax()),
    "mixture-of-experts": (
        MixtureOfExpertsLike,
        mixture_of_experts,
        lambda m, x: x @ m.w_gating,
        mb.Softmax(),
    ),
}


def switch_loss(logits: Tensor, gate: mb.gates.Gate) -> Tensor:
    """α E Σ f P, with f of the K largest logits."""
    flat = logits.reshape(-1, EXPERTS)
    affinities = flat.sigmoid() if isinstance(gate, mb.Sigmoid) else flat.softmax(-1)
    scores = affinities / affinities.sum(-1, keepdim=True)
    load = torch.bincount(flat.topk(TOP_K).indices.flatten(), minlength=EXPERTS) / len(flat) / TOP_K
    return METHOD.strength * EXPERTS * (load * scores.mean(0)).sum()


WAYS = {
    "plain": lambda layer, x: layer(x),
    "recomputed": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "reentrant": lambda layer, x: checkpoint(layer, x.requires_grad_(), use_reentrant=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_charged_as_if_the_term_stood_in_its_loss(name, way):
    make, attach, logits_of, gate = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    layer, x = model[0], torch.randn(3, 8, WIDTH)
    gates = next(p for n, p in model.named_parameters() if "experts" not in n)
    balancing = attach(model)
    balancing.follow(WAYS[way](model, x).square().mean()).backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 24
    found, gates.grad = gates.grad, None
    balancing.detach()
    (model(x).square().mean() + switch_loss(logits_of(layer, x), gate)).backward()
    torch.testing.assert_close(found, gates.grad, rtol=1e-5, atol=1e-7)
    gates.grad = None
    model(x).square().mean().backward()
    assert (found - gates.grad).abs().max() > 1e-3 * found.abs().max()
