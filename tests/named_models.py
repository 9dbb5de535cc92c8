"""Hand-written models whose routers are modules that return logits, named to `attach`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moebalance as mb
from moebalance.gates import Gate

WIDTH, EXPERTS, TOP_K = 16, 8, 2


def combine(experts: nn.ModuleList, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, place = (chosen == number).nonzero(as_tuple=True)
        out = out.index_add(0, token, expert(x[token]) * weights[token, place, None])
    return out


class Layer(nn.Module):
    """A layer as people write it: a linear gate, softmax or sigmoid, top-k, normalised or not."""

    def __init__(self, gate: Gate | None = None, *, normalize: bool = True, top_k: int = TOP_K):
        super().__init__()
        self.scores = torch.sigmoid if isinstance(gate, mb.Sigmoid) else _softmax
        self.normalize, self.top_k = normalize, top_k
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(EXPERTS)
        )

    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.scores(logits).topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        return combine(self.experts, flat, *self.weigh(self.gate(flat))).view(x.shape)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module, recompute: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = recompute

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            more = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            x = x + more
        return x


def attach(model: nn.Module, routers: Any = "*.gate", **more: Any) -> mb.Balancing:
    method = more.pop("method", mb.PhiBalancing())
    return mb.attach(model, method, routers=routers, **{"top_k": 2, **more})


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1)


def padded() -> tuple[Tensor, Tensor]:
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1, 9:] = mask[3, 2:] = False
    return torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(7)), mask


def train(model: nn.Module, balancing: mb.Balancing, *, batches: int, steps: int = 30) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        x = torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(step))
        for part in x.chunk(batches):
            (balancing.follow(model(part).square().mean()) / batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        balancing.step()
