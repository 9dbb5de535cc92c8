"""How a router turns logits into affinities and scores, and which experts a token chooses.

T tokens, E experts, K chosen experts per token.

    logits      z (T, E)   from the router's linear map
    affinities  a (T, E)   softmax(z), sigmoid(z), …: what top-k ranks
    scores      p (T, E)   a / Σ a, rows sum to one: what a method observes and charges

Every gate is a softmax of log-affinities, p = softmax(log a(z)). So one pair of derivatives serves
all of them: `price_gradient` from a price on p to the affinities, `backward` from the affinities to
the logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32. Float64, in which mathematics is tested, stays."""
    return x if x.dtype == torch.float64 else x.float()


class Gate(ABC):
    """How a router turns logits into affinities. A subclass gives log a(z) and the derivative."""

    sums_to_one: ClassVar[bool] = False
    """Whether a token's affinities sum to one: then they are smaller if there are more experts."""

    @abstractmethod
    def log_affinity(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """log a(z), up to a constant per token, float32 or wider."""

    def affinities(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """a(z): what top-k ranks, on the scale that the router itself uses."""
        return self.log_affinity(logits).exp()

    def scores(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """p = a / Σ a: rows sum to one, float32 or wider, differentiable."""
        return self.log_affinity(logits).softmax(dim=-1)

    def row_scale(self, affinities: Float[Tensor, "T E"]) -> Float[Tensor, "T"] | None:
        """1 / Σ_e a_e (T,), which turns affinities into scores; None if it is 1."""
        # clamp: the scale is multiplied by a price and by a loss scale, and must not overflow. A
        # row of sigmoids that are all below e^−69 then has scores that sum to less than one.
        return affinities.sum(dim=-1).clamp_(min=1e-30).reciprocal_()

    def price_gradient(
        self,
        price: Float[Tensor, "*rows E"],
        affinities: Float[Tensor, "T E"],
        row_scale: Float[Tensor, "T"] | None,
    ) -> Float[Tensor, "T E"]:
        """Gradient (T, E) of Σ_t ⟨price_t, p_t⟩ with respect to the affinities.

        Row t is (price − ⟨p_t, price⟩) / Σ_e a_te.

        Args:
            price: (E,) for all tokens, or (T, E).
            affinities: (T, E), 0 in padded rows.
            row_scale: (T,), from `row_scale`.
        """
        assert row_scale is not None
        price = price.to(affinities.dtype)
        if price.dim() == 2:
            worth = (affinities * price).sum(dim=-1).mul_(row_scale)
            return (price - worth.unsqueeze(-1)).mul_(row_scale.unsqueeze(-1))
        columns, rows = _of_rank_two(price, affinities, row_scale)
        return columns @ rows

    def add_price_gradient(
        self,
        gradient: Float[Tensor, "T E"],
        price: Float[Tensor, "E"],
        affinities: Float[Tensor, "T E"],
        row_scale: Float[Tensor, "T"] | None,
        mask: Bool[Tensor, "T"] | None = None,
    ) -> None:
        """Add `price_gradient` to the real rows of `gradient` (T, E), in place and in one pass."""
        assert row_scale is not None
        columns, rows = _of_rank_two(price.to(affinities.dtype), affinities, row_scale)
        if mask is not None:
            columns = torch.where(mask.unsqueeze(-1), columns, 0.0)
        gradient.addmm_(columns, rows)

    @abstractmethod
    def backward(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """Gradient of the logits from the gradient of the affinities, in one pass."""

    def backward_over(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """`backward`, which may write over `upstream`: fresh memory costs a processor a pass."""
        return self.backward(upstream, affinities)


def _of_rank_two(
    price: Float[Tensor, "E"], affinities: Float[Tensor, "T E"], row_scale: Float[Tensor, "T"]
) -> tuple[Float[Tensor, "T 2"], Float[Tensor, "2 E"]]:
    """The gradient of one price for all rows, as a product: no (T, E) is read a second time."""
    worth = torch.mv(affinities, price).mul_(row_scale)
    columns = torch.stack([row_scale, worth.mul_(row_scale)]).t()
    return columns, torch.stack([price, price.new_full(price.shape, -1.0)])


@dataclass(frozen=True)
class Softmax(Gate):
    """a = p = softmax(z): Switch, Mixtral, Qwen, OLMoE; softmax before or after top-k alike.

    >>> Softmax().scores(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    sums_to_one = True

    def log_affinity(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """z itself, which is log softmax(z) up to a constant per token."""
        return at_least_float32(logits)

    def scores(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """softmax(z), in one pass."""
        return at_least_float32(logits).softmax(dim=-1)

    def affinities(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """softmax(z): affinity and score are the same number."""
        return self.scores(logits)

    def row_scale(self, affinities: Float[Tensor, "T E"]) -> None:
        """None: rows sum to one."""
        return

    def price_gradient(
        self,
        price: Float[Tensor, "*rows E"],
        affinities: Float[Tensor, "T E"],
        row_scale: Float[Tensor, "T"] | None,
    ) -> Float[Tensor, "T E"]:
        """The price in every row; softmax ignores the term that is constant in a row."""
        return price.to(affinities.dtype).expand_as(affinities)

    def add_price_gradient(
        self,
        gradient: Float[Tensor, "T E"],
        price: Float[Tensor, "E"],
        affinities: Float[Tensor, "T E"],
        row_scale: Float[Tensor, "T"] | None,
        mask: Bool[Tensor, "T"] | None = None,
    ) -> None:
        """Add the price to every real row."""
        if mask is None:
            gradient.add_(price)
        else:
            gradient.addr_(mask.to(gradient.dtype), price.to(gradient.dtype))

    def backward(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """Softmax's own backward pass, a ∘ (g − ⟨a, g⟩)."""
        return torch._softmax_backward_data(upstream, affinities, -1, affinities.dtype)

    def backward_over(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """The same, in place on a processor: there a row is read whole before it is written."""
        if not on_host(upstream) or upstream.dtype != affinities.dtype:
            return self.backward(upstream, affinities)
        backward = torch.ops.aten._softmax_backward_data.out
        backward(upstream, affinities, -1, affinities.dtype, grad_input=upstream)
        return upstream


@dataclass(frozen=True)
class Sigmoid(Gate):
    """a = σ(z): DeepSeek-V3, GLM-4 and the loss-free paper.

    >>> Sigmoid().affinities(torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    def log_affinity(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """log σ(z)."""
        return F.logsigmoid(at_least_float32(logits))

    def affinities(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """σ(z), in one pass."""
        return torch.sigmoid(at_least_float32(logits))

    def backward(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """g ∘ a ∘ (1 − a)."""
        gradient: Tensor = torch.ops.aten.sigmoid_backward(upstream, affinities)
        return gradient

    def backward_over(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """The same, in place on a processor."""
        if not on_host(upstream) or upstream.dtype != affinities.dtype:
            return self.backward(upstream, affinities)
        backward = torch.ops.aten.sigmoid_backward.grad_input
        backward(upstream, affinities, grad_input=upstream)
        return upstream


@dataclass(frozen=True)
class SqrtSoftplus(Gate):
    """a = √softplus(z): DeepSeek-V4.

    >>> SqrtSoftplus().scores(torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    def log_affinity(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """½ log softplus(z)."""
        z = at_least_float32(logits)
        # Far below 0 softplus(z) underflows to e^z, whose half logarithm is z/2. The other branch
        # is clamped: its gradient would be 0 · ∞ there.
        usual = 0.5 * F.softplus(z.clamp(min=_UNDERFLOW)).log()
        return torch.where(z < _UNDERFLOW, 0.5 * z, usual)

    def backward(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """g ∘ (1 − exp(−a²)) / 2a, because a² = softplus(z) and σ(z) = 1 − exp(−softplus(z))."""
        # clamp: an affinity that underflowed to 0 has slope 0, not 0/0.
        slope = -torch.expm1(-affinities.square()) / (2 * affinities).clamp(min=_TINY)
        return upstream * slope


_TINY = torch.finfo(torch.float32).tiny
_TIE = 1e-10  # what a logit weighs where scores are ranked: only equals ever feel it
_MILD = 8.0  # below this logits that matter differ in their affinities too
_SMALL = 1e-20  # an affinity below this has an even smaller derivative
_FULL = 0.9995  # from here on the affinities of a sigmoid no longer tell logits apart
_UNDERFLOW = -15.0  # below this softplus(z) = e^z to float32's precision


@dataclass(frozen=True)
class GroupLimit:
    """Top-k within the best groups of neighbouring experts, for example the experts of one node.

    DeepSeek-V2 (arXiv 2405.04434, 2.1.2) ranks a group by its best expert (`best=1`), DeepSeek-V3
    (arXiv 2412.19437, 2.1.2) by the sum of its best two.

    Args:
        groups: number of groups, of equal size (`n_group` in Transformers).
        top_groups: number of groups a token may choose from (`topk_group`).
        best: a group is ranked by the sum of its `best` highest experts.

    >>> GroupLimit(2, top_groups=1, best=1).within(torch.tensor([[0.4, 0.1, 0.2, 0.3]]))
    tensor([[0.4000, 0.1000,   -inf,   -inf]])
    """

    groups: int
    top_groups: int
    best: int = 2

    @property
    def narrows(self) -> bool:
        """Whether any expert is out of reach."""
        return self.top_groups < self.groups

    def check(self, num_experts: int, top_k: int) -> None:
        """Refuse a limit that does not fit a router.

        Raises:
            TypeError: a number is not whole.
            ValueError: the limit does not fit; the message says why.
        """
        groups, top_groups, best = self.groups, self.top_groups, self.best
        if not all(type(number) is int for number in (groups, top_groups, best)):
            raise TypeError(f"{self}: groups, top_groups and best must be whole numbers.")
        if groups < 1 or num_experts % groups:
            raise ValueError(
                f"{self}: {num_experts} experts do not fall into {groups} equal groups."
            )
        size = num_experts // groups
        if not (1 <= top_groups <= groups and 1 <= best <= size and top_k <= top_groups * size):
            raise ValueError(
                f"{self} with top_k={top_k}: top_groups must lie in 1..{groups}, best in 1..{size} "
                f"(experts of a group), top_k in 1..{top_groups * size} (experts in top groups)."
            )

    def within(self, ranks: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The ranks (T, E), with −∞ for experts out of reach."""
        if not self.narrows:
            return ranks
        # An expert ranked −∞ in an open group still comes before every expert out of reach.
        ranks = ranks.clamp(min=torch.finfo(ranks.dtype).min)
        groups = ranks.reshape(*ranks.shape[:-1], self.groups, ranks.shape[-1] // self.groups)
        worth = groups.topk(self.best, dim=-1, sorted=False).values.sum(dim=-1)
        kept = worth.topk(self.top_groups, dim=-1, sorted=False).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, kept, False)
        return groups.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)


def best(
    logits: Float[Tensor, "T E"],
    affinities: Float[Tensor, "T E"],
    order: Float[Tensor, "T E"] | None,
    top_k: int,
    limit: GroupLimit | None = None,
) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
    """The K best experts by `order`, or by affinity if it is None: affinities and indices.

    In no order: sorting takes time, and a mixture of experts has no use for it.
    """
    logits = logits.detach()
    if order is None and limit is None and on_host(logits):
        # Top-k has the affinities at hand. A look at them tells whether logits must rank instead.
        values, experts = affinities.topk(top_k, dim=-1, sorted=False)
        if values.numel() and _tell_apart(values):
            return values, experts
    if order is None:
        order = logits if limit is None else affinities.detach()
    experts = top_experts(order, logits, top_k, limit)
    return affinities.gather(-1, experts), experts


def top_experts(
    order: Float[Tensor, "T E"],
    logits: Float[Tensor, "T E"],
    top_k: int,
    limit: GroupLimit | None = None,
) -> Int[Tensor, "T K"]:
    """The K best experts by `order`, in no order. Of equals the larger logit is ahead.

    Scores are equal where logits are not: σ(20) and σ(25) are both 1 in float32, and where a logit
    is 110 ahead the softmax of all others is 0. Top-k alone would choose by the index then. Without
    groups, a GPU or a compiler is not asked whether there are equals: top-k chooses by the index.

    >>> top_experts(torch.ones(1, 3), torch.tensor([[20.0, 25.0, 22.0]]), 1).item()
    1
    """
    if limit is not None and limit.narrows:
        order = limit.within(untied(order, logits))
        return order.topk(top_k, dim=-1, sorted=False).indices
    values, experts = order.topk(top_k, dim=-1, sorted=False)
    if order is logits or not on_host(order) or mild(logits):
        return experts
    last = values.amin(dim=-1, keepdim=True)
    if int((order >= last).sum()) > experts.numel():  # some of the best are as good as others
        return untied(order, logits).topk(top_k, dim=-1, sorted=False).indices
    return experts


def _tell_apart(affinities: Float[Tensor, "T K"]) -> bool:
    """Whether these are neither so small nor so large that different logits share one."""
    ends: list[float] = [end.tolist() for end in affinities.aminmax()]  # type: ignore[misc]
    return ends[0] > _SMALL and ends[1] < _FULL


def mild(logits: Float[Tensor, "T E"]) -> bool:
    """Whether no affinity is near its ends, as far as the host can see."""
    if not on_host(logits):
        return False
    return not logits.numel() or all(abs(float(end)) < _MILD for end in logits.aminmax())


def on_host(tensor: Tensor) -> bool:
    """Whether a value may be looked at: no device has to be asked, and nothing is only traced."""
    plain = type(tensor) is Tensor or isinstance(tensor, torch.nn.Parameter)
    real = plain and not isinstance(tensor, FakeTensor)  # a fake parameter is both
    return real and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def untied(order: Float[Tensor, "T E"], logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """The order, with what a logit adds below the last digit of a score in float32 (6e-8)."""
    if order.device.type == "mps":  # which has no float64
        return order
    return order.double().add_(logits, alpha=_TIE)


def normalized(
    chosen: Float[Tensor, "T K"],
) -> tuple[Float[Tensor, "T K"], Float[Tensor, "T 1"]]:
    """Each row divided by its sum, and the sum."""
    # clamp: a price may choose experts whose affinities all underflowed.
    total = chosen.sum(dim=-1, keepdim=True).clamp(min=_SMALL)
    return chosen / total, total
