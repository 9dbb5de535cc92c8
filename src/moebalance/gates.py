"""How a router turns logits into affinities and scores, and where a token may choose.

Every gate in use is a softmax of *log-affinities* a(z), which covers softmax gates (a(z) = z) and
normalised sigmoid gates (a(z) = log σ(z)) with one formula and one derivative:

    p = softmax(a(z)),      ∂⟨q, p⟩/∂z = p ∘ (q − ⟨p, q⟩) ∘ a'(z).

The affinity exp(a(z)), softmax probability or plain sigmoid, is what a router ranks when it chooses
its experts; the score p, whose rows sum to one, is what a method observes and charges.

Symbols: T tokens, E experts, K chosen experts per token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Gate(ABC):
    """How a router turns logits into affinities; subclasses give a(z) and its derivative."""

    sums_to_one: ClassVar[bool] = False
    """Whether the affinities of a token sum to one, so that each is smaller among more experts."""

    @abstractmethod
    def log_affinity(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """a(z), elementwise up to a constant per token, float32 or wider."""

    @abstractmethod
    def slope(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"] | None:
        """a'(z), or None where it is 1 everywhere."""

    def affinities(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """exp(a(z)): the quantity top-k ranks, on the scale the router itself uses."""
        return self.log_affinity(logits).exp()

    def scores(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """p = softmax(a(z)): rows sum to one, float32 at least, differentiable."""
        return self.log_affinity(logits).softmax(dim=-1)

    def row_scale(self, affinities: Float[Tensor, "T E"]) -> Float[Tensor, "T"] | None:
        """What turns a row of affinities into scores, 1 / Σ_e a_e; None where that is 1.

        A row whose affinities sum to less than 1e-30, sigmoids below e^−69 all of them, has scores
        that sum to less than one: their scale times a price and a loss scale must not overflow.
        """
        return affinities.sum(dim=-1).clamp_(min=1e-30).reciprocal_()

    @abstractmethod
    def backward(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """Gradient of the logits from that of the affinities, in one pass; no logits needed."""

    def charge(
        self,
        price: Float[Tensor, "E"],
        affinities: Float[Tensor, "T E"],
        row_scale: Float[Tensor, "T"] | None,
    ) -> Float[Tensor, "T E"]:
        """Gradient of Σ_t ⟨price, p_t⟩ with respect to the affinities.

        With 1/S_t the scale of row t it is (price − ⟨p_t, price⟩) / S_t, a matrix of rank two.
        """
        assert row_scale is not None
        price = price.to(affinities.dtype)
        worth = torch.mv(affinities, price).mul_(row_scale)
        columns = torch.stack([row_scale, worth.mul_(row_scale)])
        return columns.t() @ torch.stack([price, price.new_full(price.shape, -1.0)])

    def pull_back(
        self,
        price: Float[Tensor, "*rows E"],
        scores: Float[Tensor, "T E"],
        logits: Float[Tensor, "T E"],
    ) -> Float[Tensor, "T E"]:
        """Gradient of Σ_t ⟨price_t, p_t⟩ with respect to the logits.

        Args:
            price: (E,) the same for every token, or (T, E).
            scores: p (T, E), as `scores(logits)` gave them.
            logits: z (T, E).
        """
        gradient = scores * (price - (scores * price).sum(dim=-1, keepdim=True))
        slope = self.slope(logits)
        return gradient if slope is None else gradient * slope


@dataclass(frozen=True)
class Softmax(Gate):
    """p = softmax(z): Switch, Mixtral, Qwen, OLMoE; softmax before or after top-k alike.

    >>> Softmax().scores(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    sums_to_one = True

    def log_affinity(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """log softmax(z)."""
        return at_least_float32(logits).log_softmax(dim=-1)

    def scores(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """softmax(z), in one pass."""
        return at_least_float32(logits).softmax(dim=-1)

    def affinities(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """softmax(z): affinity and score are the same number for this gate."""
        return self.scores(logits)

    def row_scale(self, affinities: Float[Tensor, "T E"]) -> None:
        """1: rows of softmax sum to one."""
        return

    def backward(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """Softmax's own backward pass, a ∘ (g − ⟨a, g⟩)."""
        return torch._softmax_backward_data(upstream, affinities, -1, affinities.dtype)

    def charge(
        self,
        price: Float[Tensor, "E"],
        affinities: Float[Tensor, "T E"],
        row_scale: Float[Tensor, "T"] | None,
    ) -> Float[Tensor, "T E"]:
        """The price on every row; what is missing is constant in a row, which softmax ignores."""
        return price.to(affinities.dtype).expand_as(affinities)

    def pull_back(
        self,
        price: Float[Tensor, "*rows E"],
        scores: Float[Tensor, "T E"],
        logits: Float[Tensor, "T E"],
    ) -> Float[Tensor, "T E"]:
        """The same as softmax's own backward pass of the price, in one pass over the scores."""
        upstream = price.to(scores.dtype).expand_as(scores)
        return torch._softmax_backward_data(upstream, scores, -1, scores.dtype)

    def slope(self, logits: Float[Tensor, "T E"]) -> None:
        """1: softmax is invariant to the log-normaliser."""
        return


@dataclass(frozen=True)
class Sigmoid(Gate):
    """p = σ(z) / Σσ(z): DeepSeek-V3, GLM-4 and the loss-free paper.

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

    def slope(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """1 − σ(z)."""
        return torch.sigmoid(-at_least_float32(logits))


@dataclass(frozen=True)
class SqrtSoftplus(Gate):
    """p ∝ √softplus(z): DeepSeek-V4.

    >>> SqrtSoftplus().scores(torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]])
    """

    def log_affinity(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """½ log softplus(z), which is z/2 where softplus underflows to e^z."""
        z = at_least_float32(logits)
        low = z < _UNDERFLOW
        # Both branches are finite everywhere, for a gradient of the other would be 0 · ∞.
        return torch.where(low, 0.5 * z, 0.5 * F.softplus(z.clamp(min=_UNDERFLOW)).log())

    def backward(
        self, upstream: Float[Tensor, "T E"], affinities: Float[Tensor, "T E"]
    ) -> Float[Tensor, "T E"]:
        """g ∘ (1 − exp(−a²)) / 2a, as a² = softplus(z) and σ(z) = 1 − exp(−softplus(z))."""
        # clamp: an affinity that underflowed to 0 has slope 0, not 0/0.
        slope = -torch.expm1(-affinities.square()) / (2 * affinities).clamp(min=_TINY)
        return upstream * slope

    def slope(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """σ(z) / (2 softplus(z))."""
        z = at_least_float32(logits)
        usual = 0.5 * torch.sigmoid(z) / F.softplus(z.clamp(min=_UNDERFLOW))
        return torch.where(z < _UNDERFLOW, 0.5, usual)


_TINY = torch.finfo(torch.float32).tiny


_UNDERFLOW = -15.0  # from here down softplus(z) = e^z to float32's precision


@dataclass(frozen=True)
class GroupLimit:
    """A choice within the best groups of neighbouring experts, as of the experts of a few nodes.

    DeepSeek-V2 (arXiv 2405.04434, 2.1.2) judges a group by its best expert, `best` = 1; DeepSeek-V3
    (arXiv 2412.19437, 2.1.2) by the sum of its best two.

    Args:
        groups: number of groups, of equal size (`n_group` in Transformers).
        top_groups: number of groups a token may choose from (`topk_group`).
        best: a group's rank is the sum of this many of its experts' best.

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
        """Say whether it fits a router.

        Raises:
            TypeError: its numbers are not whole.
            ValueError: it does not fit; says why.
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
        """What top-k ranks, with −∞ for the experts out of reach."""
        if not self.narrows:
            return ranks
        # An expert ranked at −∞ is a last resort, but of an open group before one out of reach.
        ranks = ranks.clamp(min=torch.finfo(ranks.dtype).min)
        groups = ranks.reshape(*ranks.shape[:-1], self.groups, ranks.shape[-1] // self.groups)
        worth = groups.topk(self.best, dim=-1, sorted=False).values.sum(dim=-1)
        kept = worth.topk(self.top_groups, dim=-1, sorted=False).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, kept, False)
        return groups.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32 and leave float64 (the tests of mathematics) alone."""
    return x if x.dtype == torch.float64 else x.float()
