"""A stack of MoE layers, and how tensor, sequence and expert parallelism cut one of its layers.

Small and in float64, so that what differs between two layouts is the method and not the rounding.
Each rank holds whole weights and uses its own part of them: what is sent is as in the real thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebalance import BalancedRouter, Method

EXPERTS, WIDTH, HIDDEN, TOP_K, LAYERS = 8, 6, 4, 2, 2


class Block(nn.Module):
    """x + Σ over the chosen experts of w_e · tanh(x A_e) B_e."""

    def __init__(self, method: Method, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) / 2)

        self.gate = weight(EXPERTS, WIDTH)
        self.up, self.down = weight(EXPERTS, WIDTH, HIDDEN), weight(EXPERTS, HIDDEN, WIDTH)
        self.router = BalancedRouter(method, EXPERTS, TOP_K)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        weights, experts = self.router(x @ self.gate.mT, mask)
        return x + self.mix(x, weights, experts)

    def mix(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        return mixture(x, weights, experts, self.up, self.down)


class NamedBlock(Block):
    """The same with a linear map for a gate, which `attach(model, routers=…)` names."""

    def __init__(self, method: Method, seed: int) -> None:
        super().__init__(method, seed)
        weight = self.gate.data
        del self.gate, self.router
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False, dtype=weight.dtype)
        self.gate.weight.data = weight

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        weights, experts = self.gate(x).softmax(dim=-1).topk(TOP_K, dim=-1)
        return x + self.mix(x, weights / weights.sum(dim=-1, keepdim=True), experts)


class TensorParallelBlock(Block):
    """Every rank sees every token and computes half of each expert's hidden units."""

    def mix(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        half = own_part(HIDDEN)
        out = mixture(
            _Enter.apply(x), _Enter.apply(weights), experts, self.up[..., half], self.down[:, half]
        )
        return _Leave.apply(out)


class SequenceParallelBlock(Block):
    """As above, but each rank routes its own half of every sequence."""

    def mix(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        half = own_part(HIDDEN)
        every = _Gather.apply(x), _Gather.apply(weights), _Gather.apply(experts)
        return _Scatter.apply(mixture(*every, self.up[..., half], self.down[:, half]))


class ExpertParallelBlock(Block):
    """Each rank holds half of the experts; tokens travel to their experts and back."""

    def mix(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        flat, chosen = x.reshape(-1, WIDTH), experts.reshape(-1)
        ranks = dist.get_world_size()
        owners = chosen // (EXPERTS // ranks)
        order = owners.argsort(stable=True)
        sent = owners.bincount(minlength=ranks)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        there, back = (sent.tolist(), received.tolist()), (received.tolist(), sent.tolist())

        tokens = order // TOP_K
        mine = _Exchange.apply(flat[tokens], *there)
        which = _Exchange.apply(chosen[order], *there)
        hidden = torch.einsum("nd,ndh->nh", mine, self.up[which]).tanh()
        answers = _Exchange.apply(torch.einsum("nh,nhd->nd", hidden, self.down[which]), *back)
        weighed = answers * weights.reshape(-1)[order].unsqueeze(-1)
        return torch.zeros_like(flat).index_add(0, tokens, weighed).view_as(x)


class NamedTensorParallelBlock(TensorParallelBlock, NamedBlock):
    """Tensor parallelism with a gate that `attach` names."""


class NamedSequenceParallelBlock(SequenceParallelBlock, NamedBlock):
    """Sequence parallelism with a gate that `attach` names."""


class NamedExpertParallelBlock(ExpertParallelBlock, NamedBlock):
    """Expert parallelism with a gate that `attach` names."""


class Dense(nn.Module):
    """x + tanh(x A) B: a layer without experts."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self.up = nn.Parameter(torch.randn(WIDTH, HIDDEN, generator=generator, dtype=torch.float64))
        self.down = nn.Parameter(self.up.data.mT / 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + (x @ self.up).tanh() @ self.down


def dense_first(method: Method, seed: int) -> nn.Module:
    """A first layer without experts, then layers whose gate `attach` names."""
    return Dense() if seed == 0 else NamedBlock(method, seed)


class Stack(nn.Module):
    """Some layers, one after another; `losses` makes a loss of what comes out."""

    def __init__(
        self,
        method: Method,
        block: Callable[..., nn.Module] = Block,
        layers: Sequence[int] = range(LAYERS),
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(n): block(method, seed=n) for n in layers})

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers.values():
            x = layer(x, mask)
        return x


def losses(hidden: Tensor) -> Tensor:
    """Loss of each token."""
    return (hidden - 1).square().mean(-1)


def mixture(x: Tensor, weights: Tensor, experts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    every = torch.einsum("...d,edh->...eh", x, up).tanh()
    every = torch.einsum("...eh,ehd->...ed", every, down)
    chosen = every.gather(-2, experts.unsqueeze(-1).expand(*experts.shape, WIDTH))
    return (weights.unsqueeze(-1) * chosen).sum(-2)


def own_part(size: int) -> slice:
    """This rank's share of an axis."""
    share = size // dist.get_world_size()
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def _total(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def _together(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=1)


class _Enter(torch.autograd.Function):
    """Into a region where ranks compute parts: the gradients of the parts are added up."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return _total(gradient)


class _Leave(torch.autograd.Function):
    """Out of it: the parts are added up."""

    @staticmethod
    def forward(ctx, x):
        return _total(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Gather(torch.autograd.Function):
    """Whole sequences out of the ranks' parts of them."""

    @staticmethod
    def forward(ctx, x):
        return _together(x)

    @staticmethod
    def backward(ctx, gradient):
        return _total(gradient)[:, own_part(gradient.shape[1])]


class _Scatter(torch.autograd.Function):
    """Add up, and keep this rank's part of every sequence."""

    @staticmethod
    def forward(ctx, x):
        return _total(x)[:, own_part(x.shape[1])]

    @staticmethod
    def backward(ctx, gradient):
        return _together(gradient)


class _Exchange(torch.autograd.Function):
    """Send rows to other ranks, so many to each, and receive theirs."""

    @staticmethod
    def forward(ctx, rows, sent, received):
        ctx.back = received, sent
        return _exchange(rows, sent, received)

    @staticmethod
    def backward(ctx, gradient):
        return _exchange(gradient, *ctx.back), None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
    new = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(new, rows.contiguous(), received, sent)
    return new
