"""What one router did with one batch: scores, choices and the additive sums taken from them.

Every gate in use is a softmax of *log-affinities* a(z), which covers softmax gates (a(z) = z) and
normalised sigmoid gates (a(z) = log σ(z)) with one formula and one derivative:

    p = softmax(a(z)),      ∂⟨q, p⟩/∂z = p ∘ (q − ⟨p, q⟩) ∘ a'(z).

The affinity exp(a(z)), softmax probability or plain sigmoid, is what a router ranks when it chooses
its experts; the score p, whose rows sum to one, is what a balancer observes and charges.

Symbols: T tokens, E experts, K chosen experts per token.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Gate(ABC):
    """How a router turns logits into affinities; subclasses give a(z) and its derivative."""

    shares_one: ClassVar[bool] = False
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

    shares_one = True

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
        count: number of groups, of equal size.
        kept: number of groups a token may choose from.
        best: a group's rank is the sum of this many of its experts' best.

    >>> GroupLimit(2, kept=1, best=1).within(torch.tensor([[0.4, 0.1, 0.2, 0.3]]))
    tensor([[0.4000, 0.1000,   -inf,   -inf]])
    """

    count: int
    kept: int
    best: int = 2

    @property
    def narrows(self) -> bool:
        """Whether any expert is out of reach."""
        return self.kept < self.count

    def check(self, num_experts: int, top_k: int) -> None:
        """Say whether it fits a router.

        Raises:
            TypeError: its numbers are not whole.
            ValueError: it does not fit; says why.
        """
        count, kept, best = self.count, self.kept, self.best
        if not all(type(number) is int for number in (count, kept, best)):
            raise TypeError(f"{self}: count, kept and best must be whole numbers.")
        if count < 1 or num_experts % count:
            raise ValueError(
                f"{self}: {num_experts} experts do not fall into {count} equal groups."
            )
        size = num_experts // count
        if not (1 <= kept <= count and 1 <= best <= size and top_k <= kept * size):
            raise ValueError(
                f"{self} with top_k={top_k}: kept must lie in 1..{count}, best in 1..{size}, the "
                f"experts of a group, and top_k in 1..{kept * size}, those of the kept groups."
            )

    def within(self, ranks: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """What top-k ranks, with −∞ for the experts out of reach."""
        if not self.narrows:
            return ranks
        # An expert ranked at −∞ is a last resort, but of an open group before one out of reach.
        ranks = ranks.clamp(min=torch.finfo(ranks.dtype).min)
        groups = ranks.reshape(*ranks.shape[:-1], self.count, ranks.shape[-1] // self.count)
        worth = groups.topk(self.best, dim=-1, sorted=False).values.sum(dim=-1)
        kept = worth.topk(self.kept, dim=-1, sorted=False).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, kept, False)
        return groups.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)


class Routing(NamedTuple):
    """What one router did with one batch.

    Attributes:
        logits: z (T, E), as the router's linear map gave them.
        scores: p (T, E), rows sum to one, float32 at least, differentiable.
        experts: (T, K) int64, the experts each token was sent to.
        gate: how `scores` came from `logits`.
        mask: (T,) True for a real token, False for padding; None if all are real.
        sequences: number of equally long sequences the T tokens are laid out in, row by row.
    """

    logits: Float[Tensor, "T E"]
    scores: Float[Tensor, "T E"]
    experts: Int[Tensor, "T K"]
    gate: Gate
    mask: Bool[Tensor, "T"] | None = None
    sequences: int = 1

    @property
    def num_experts(self) -> int:
        """E."""
        return self.scores.shape[-1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.experts.shape[-1]

    @property
    def tokens(self) -> Float[Tensor, ""]:
        """Number of real tokens."""
        if self.mask is None:
            return self.scores.new_full((), float(self.scores.shape[0]))
        return self.mask.sum().to(self.scores.dtype)

    @property
    def token_weights(self) -> Float[Tensor, "T"] | None:
        """1 for a real token, 0 for padding; None if all are real."""
        return None if self.mask is None else self.mask.to(self.scores.dtype)


class Sums(NamedTuple):
    """Additive statistics of a batch: those of a concatenation are the sums of the parts'.

    Attributes:
        scores: Σ_t p_t (E,).
        counts: number of tokens sent to each expert (E,).
        tokens: number of real tokens ().
        extra: further additive tensors that one method needs, for example a histogram.
    """

    scores: Float[Tensor, "E"]
    counts: Float[Tensor, "E"]
    tokens: Float[Tensor, ""]
    extra: tuple[Tensor, ...] = ()

    @property
    def soft_load(self) -> Float[Tensor, "E"]:
        """p̄, the mean score; zeros if no token was seen."""
        # clamp: an empty batch has sums 0 and shall have mean 0, not 0/0.
        return self.scores / self.tokens.clamp(min=1)

    @property
    def hard_load(self) -> Float[Tensor, "E"]:
        """f, the fraction of assignments per expert; zeros if no token was seen."""
        return self.counts / self.counts.sum(dim=-1, keepdim=True).clamp(min=1)


class Batch(NamedTuple):
    """One batch and its place in the optimizer step it belongs to.

    Attributes:
        routing: what the router did with this batch; None to a method that says it reads the sums
            alone (`Balancer.from_sums`).
        sums: this batch's sums.
        step: sums of the step so far, this batch included; for methods whose `coupling` is "step",
            to others this batch's own.
        share: this batch's share of the tokens of its step, in (0, 1]; for methods whose `coupling`
            is "batch" or "step", to others 1.
        known: number of its tokens where the host knows it, since none is padding; at least 1.
    """

    routing: Routing
    sums: Sums
    step: Sums
    share: float | Tensor = 1.0
    known: int | None = None

    @property
    def tokens(self) -> int | Tensor:
        """Number of real tokens, at least 1: an empty batch has mean 0, not 0/0."""
        return self.sums.tokens.clamp(min=1) if self.known is None else self.known

    @property
    def soft_load(self) -> Float[Tensor, "E"]:
        """p̄ of this batch."""
        return self.sums.scores / self.tokens

    @property
    def hard_load(self) -> Float[Tensor, "E"]:
        """f of this batch."""
        return self.sums.hard_load


def route(
    logits: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    gate: Gate,
    *,
    mask: Bool[Tensor, "T"] | None = None,
    sequences: int = 1,
) -> Routing:
    """Describe what a router did, given its logits and its choice.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> route(logits, logits.topk(2).indices, Softmax()).scores.sum().item()
    1.0
    """
    return Routing(logits, gate.scores(logits), experts, gate, mask, sequences)


def measure(routing: Routing, extra: Sequence[Tensor] = ()) -> Sums:
    """Sum what one batch did: scores, assignment counts and tokens, padding left out."""
    found = add_up(routing.scores, routing.experts, routing.mask)
    return found._replace(extra=tuple(extra))


def add_up(
    scores: Float[Tensor, "T E"], experts: Int[Tensor, "T K"], mask: Bool[Tensor, "T"] | None
) -> Sums:
    """Σ_t p_t, the counts of the choice and the number of tokens, over real tokens."""
    if mask is None:
        tokens = scores.new_full((), float(scores.shape[0]))
        # A constant 1 is expanded rather than allocated: (T·K,) of stride 0.
        ones = scores.new_ones(()).expand(experts.numel())
    else:
        tokens = mask.sum().to(scores.dtype)
        ones = mask.to(scores.dtype).unsqueeze(-1).expand_as(experts).reshape(-1)
    total = real_rows(scores, mask).sum(dim=0)
    counts = torch.zeros_like(total).scatter_add(0, experts.reshape(-1), ones)
    return Sums(total, counts, tokens)


def real_rows(values: Float[Tensor, "T *more"], mask: Bool[Tensor, "T"] | None) -> Tensor:
    """Values with padded rows set to 0, whatever they held: 0 · NaN would be NaN."""
    if mask is None:
        return values
    return torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0.0)


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32 and leave float64 (the tests of mathematics) alone."""
    return x if x.dtype == torch.float64 else x.float()
