"""Two modules for a hand-written MoE layer: one routes, one counts and charges.

BalancedRouter   logits → weights and experts, top-k by any method
CountAndCharge   logits and the experts that your layer chose → the same logits
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.core.autograd import choose
from moebalance.core.layer import LayerBalance
from moebalance.core.sequences import Lay, packed
from moebalance.gates import Gate, GroupLimit, Softmax, best, normalized, on_host
from moebalance.methods.base import Method, under_price
from moebalance.routing import real_tokens

_SOFTMAX = Softmax()

logger = logging.getLogger("moebalance")


class _Router(LayerBalance):
    """What both modules share: what they are given, and how tokens lie in sequences."""

    def _real(
        self, shape: torch.Size, mask: Bool[Tensor, "*tokens"] | None
    ) -> Bool[Tensor, "T"] | None:
        """The mask of logits of this shape, flat.

        Raises:
            ValueError: the last axis is not the experts, or the mask does not fit.
        """
        if shape[-1] != self.num_experts:
            raise ValueError(
                f"{self.name}: logits of shape {tuple(shape)} for {self.num_experts} "
                "experts: the last axis must be the experts."
            )
        if mask is None:
            return None
        if mask.shape != shape[:-1]:
            raise ValueError(
                f"{self.name}: mask of shape {tuple(mask.shape)} for logits of shape "
                f"{tuple(shape)}: it must have the logits' shape without the last axis."
            )
        return real_tokens(mask, f"{self.name}: mask").reshape(-1)

    def _given(
        self, experts: Int[Tensor, "*tokens K"], shape: torch.Size, top_k: int | None = None
    ) -> Int[Tensor, "T K"]:
        """Choices from elsewhere, flat; any K if `top_k` is None.

        Raises:
            ValueError: no whole numbers, another shape, or experts that the router does not have.
        """
        per_token = "K" if top_k is None else top_k
        fits = experts.shape[:-1] == shape[:-1] and top_k in (None, experts.shape[-1])
        if not fits or experts.dim() != len(shape) or experts.is_floating_point():
            wanted = ", ".join(map(str, (*shape[:-1], per_token)))
            raise ValueError(
                f"{self.name}: experts of shape {tuple(experts.shape)} and {experts.dtype} for "
                f"logits of shape {tuple(shape)}: give whole numbers of shape ({wanted})."
            )
        flat = experts.reshape(-1, experts.shape[-1]).long()
        if on_host(flat) and flat.numel():
            low, high = (int(end) for end in flat.aminmax())
            if not 0 <= low <= high < self.num_experts:
                raise ValueError(
                    f"{self.name}: experts from {low} to {high}, but the router has 0 to "
                    f"{self.num_experts - 1}. Give padding any of these, and a mask."
                )
        return flat

    def _lay_out(
        self,
        shape: torch.Size,
        mask: Bool[Tensor, "T"] | None,
        sequences: int | None,
        cu_seqlens: Int[Tensor, "bounds"] | None,
        *,
        training: bool,
    ) -> Lay:
        """Say where sequences lie, or refuse if that must be known and is not.

        Raises:
            ValueError: boundaries that do not fit, or none where the method needs them.
        """
        if self.running.is_meta:
            self.settle()
        if cu_seqlens is None and sequences is None:
            if len(shape) == 3:
                return Lay(mask, max(shape[0], 1))
            if training and self.by_sequence:
                raise ValueError(
                    f"{self.name}: {self.method!r} looks at single sequences, and logits of shape "
                    f"{tuple(shape)} do not say where they end. Give logits of shape (B, S, E), "
                    "sequences=B, or cu_seqlens of packed text."
                )
            return Lay(mask)
        tokens = shape[:-1].numel()
        if cu_seqlens is not None and sequences is not None:
            raise ValueError(f"{self.name}: give sequences or cu_seqlens, not both.")
        if cu_seqlens is None:
            assert sequences is not None
            if sequences < 1 or tokens % sequences:
                raise ValueError(
                    f"{self.name}: {tokens} tokens do not fall into sequences={sequences} of equal "
                    "length: give cu_seqlens, where each begins and ends."
                )
            return Lay(mask, sequences)
        return packed(cu_seqlens, tokens, mask, rows=self.by_sequence, name=self.name)

    def _tie(
        self,
        carrier: Tensor,
        logits: Float[Tensor, "T E"],
        experts: Int[Tensor, "T K"],
        lay: Lay,
        *,
        replayed: bool,
    ) -> Tensor:
        logits, experts, mask = lay.arranged(logits, experts)
        return self.tie(
            carrier, logits, experts, mask=mask, sequences=lay.sequences, replayed=replayed
        )


class BalancedRouter(_Router):
    """Top-k routing for a hand-written MoE layer, balanced by any method.

    Args:
        method: the method.
        num_experts: E.
        top_k: K, experts per token.
        gate: `Softmax()`, `Sigmoid()`, or `SqrtSoftplus()`.
        normalize: whether the K weights of a token are divided by their sum. None for yes where
            K > 1. With one expert the weight would be 1, and the task would not train the router.
        limit: the groups of experts that a token may choose from; None for all experts. Quantile
            balancing does not know of it, and balances less well under one.
        fused: whether to run as one kernel each way where that can be (`kernels.supported`).
        name: what errors and logs call this layer.

    Raises:
        TypeError: top_k is no whole number, or `limit` no `GroupLimit`.
        ValueError: top_k out of 1..E, one expert with normalised weights, a limit that does not
            fit, or shapes that do not.

    >>> from moebalance import PhiBalancing
    >>> router = BalancedRouter(PhiBalancing(), num_experts=8, top_k=2)
    >>> weights, experts = router(torch.randn(5, 8))
    >>> weights.shape, experts.shape
    (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    limit: GroupLimit | None = None  # also of a router that was pickled before there were limits

    def __init__(
        self,
        method: Method,
        num_experts: int,
        top_k: int,
        *,
        gate: Gate = _SOFTMAX,
        normalize: bool | None = None,
        limit: GroupLimit | None = None,
        fused: bool = True,
        name: str = "router",
    ) -> None:
        super().__init__(method, num_experts, gate=gate, fused=fused, name=name)
        if isinstance(top_k, bool) or not hasattr(top_k, "__index__"):
            raise TypeError(f"top_k={top_k!r}: must be a whole number.")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"top_k={top_k} with num_experts={num_experts}: top_k must lie in 1..num_experts."
            )
        if top_k == 1 and normalize:
            raise ValueError(
                "top_k=1 with normalize=True: a token's one weight divided by itself is 1, so that "
                "the task gives the router no gradient. Leave normalize out: the weight is then "
                "the affinity."
            )
        if limit is not None:
            if not isinstance(limit, GroupLimit):
                raise TypeError(f"limit={limit!r}: must be a GroupLimit such as GroupLimit(8, 4).")
            limit.check(num_experts, top_k)
        self.top_k, self.limit = top_k, limit
        self.normalize = top_k > 1 if normalize is None else normalize

    def forward(
        self,
        logits: Float[Tensor, "*tokens E"],
        mask: Bool[Tensor, "*tokens"] | None = None,
        *,
        sequences: int | None = None,
        cu_seqlens: Int[Tensor, "bounds"] | None = None,
        experts: Int[Tensor, "*tokens K"] | None = None,
    ) -> tuple[Float[Tensor, "*tokens K"], Int[Tensor, "*tokens K"]]:
        """Choose experts and weigh them. One call a batch: a second one is charged a second time.

        Args:
            logits: (T, E) or (B, S, E), from the router's linear map.
            mask: (T,) or (B, S), True or 1 for real tokens; None if all are real.
            sequences: in how many equally long sequences the tokens lie. None for B, or for 1 if
                the logits are (T, E).
            cu_seqlens: where packed sequences begin and end, for example [0, 5, 12] for lengths 5
                and 7. Tokens behind the last entry are padding. For methods such as `SequenceLoss`,
                which look at single sequences.
            experts: (T, K) or (B, S, K), choices from elsewhere, such as a replayed rollout. The
                batch is counted and charged, and the step moves no selection price
                (`Method.held`). None to choose.

        Returns:
            Weights (…, K) in the logits' dtype and experts (…, K), int64; a token's experts in any
            order.

        Raises:
            ValueError: shapes that do not fit, a mask of other numbers than 0 and 1, or packed
                tokens without boundaries under a method that looks at single sequences.
        """
        shape = logits.shape
        real = self._real(shape, mask)
        rows = logits.dim() == 2  # then views would only cost time
        flat = logits if rows else logits.reshape(-1, self.num_experts)
        training = self.training and torch.is_grad_enabled() and not self.at_rest
        lay = self._lay_out(shape, real, sequences, cu_seqlens, training=training)
        given = None if experts is None else self._given(experts, shape, self.top_k)
        weights, chosen = self._choose(flat, lay, given, training=training)
        if not self.training:
            self.watch(flat, chosen, mask=lay.mask)
        weights = weights.to(logits.dtype)
        if rows:
            return weights, chosen
        out = (*shape[:-1], self.top_k)
        return weights.view(out), chosen.view(out)

    def extra_repr(self) -> str:
        """Show the choice as well."""
        limit = "" if self.limit is None else f", limit={self.limit}"
        return f"{super().extra_repr()}, top_k={self.top_k}, normalize={self.normalize}{limit}"

    def _choose(
        self,
        logits: Float[Tensor, "T E"],
        lay: Lay,
        given: Int[Tensor, "T K"] | None,
        *,
        training: bool,
    ) -> tuple[Float[Tensor, "T K"], Int[Tensor, "T K"]]:
        """Weights of the chosen experts, tied to counting and charging, and the choice."""
        traits, preference = self.traits, None
        if traits.selects and not self.has_price and given is None:
            preference = self.preference(logits, lay.mask, training=self.training)
        # Where the two gradients are weighed they need branches of their own, which `tie` has.
        plain = traits.from_sums and given is None and self.weighing is None
        if training and logits.requires_grad and plain:
            how = self.pass_for(logits, self.top_k, normalize=self.normalize, limit=self.limit)
            return choose(logits, how, preference=preference, mask=lay.mask)
        affinities = self.gate.affinities(logits)
        if given is None:
            if self.has_price:
                about = (self.method, self.state, self.gate, logits.detach(), affinities)
                preference = under_price(*about, summed=self.limit is not None)
            weights, experts = best(logits, affinities, preference, self.top_k, self.limit)
        else:
            weights, experts = affinities.gather(-1, given), given
        if self.normalize:
            weights, _ = normalized(weights)
        if training:
            weights = self._tie(weights, logits, experts, lay, replayed=given is not None)
        return weights, experts


class CountAndCharge(_Router):
    """Balance a layer whose choice is its own: capacity, thresholds, token dropping, replay.

    Call it with the logits and the experts that your layer chose, and go on with the logits that
    it returns. They are unchanged. In backward the batch is counted, and the method's charge is
    added to their gradient. A method that selects acts through what your layer ranks: take the
    scores (T, E) of `preference(logits, mask, training=…)`, or subtract `price` (E,) from your
    affinities, if the method's price is in affinities.

    Args:
        method: the method.
        num_experts: E.
        gate: how this layer's scores come from its logits.
        fused: whether to use the fused kernels if they can run (`kernels.supported`).
        name: what errors and logs call this layer.

    >>> from moebalance import PhiBalancing
    >>> balance = CountAndCharge(PhiBalancing(), num_experts=8)
    >>> logits = torch.randn(5, 8, requires_grad=True)
    >>> balance(logits, logits.topk(2).indices).shape
    torch.Size([5, 8])
    """

    _asked = False  # for what top-k is to rank

    @property
    def price(self) -> Float[Tensor, "E"] | None:
        """The price to subtract from your affinities before you choose; None if there is none."""
        found = super().price
        self._asked |= found is not None
        return found

    def preference(
        self, logits: Float[Tensor, "T E"], mask: Bool[Tensor, "T"] | None, *, training: bool
    ) -> Float[Tensor, "T E"] | None:
        """Scores (T, E) to rank instead of your affinities; None for the affinities."""
        self._asked = True
        return super().preference(logits, mask, training=training)

    def forward(
        self,
        logits: Float[Tensor, "*tokens E"],
        experts: Int[Tensor, "*tokens K"],
        mask: Bool[Tensor, "*tokens"] | None = None,
        *,
        sequences: int | None = None,
        cu_seqlens: Int[Tensor, "bounds"] | None = None,
        replayed: bool = False,
    ) -> Float[Tensor, "*tokens E"]:
        """Count a batch and charge it; nothing else changes.

        Args:
            logits: (T, E) or (B, S, E), from the router's linear map. Use the returned ones.
            experts: (T, K) or (B, S, K), the experts that your layer chose.
            mask: (T,) or (B, S), True or 1 for real tokens; None if all are real.
            sequences: as in `BalancedRouter`.
            cu_seqlens: as in `BalancedRouter`.
            replayed: whether the choice came from elsewhere, such as a rollout. The step then moves
                no selection price.

        Returns:
            The logits, tied to the backward pass that counts and charges.

        Raises:
            ValueError: shapes that do not fit, experts that the router does not have, a mask of
                other numbers than 0 and 1, or packed tokens without boundaries under a method that
                looks at single sequences.
        """
        real = self._real(logits.shape, mask)
        flat = logits.reshape(-1, self.num_experts)
        chosen = self._given(experts, logits.shape)
        training = self.training and torch.is_grad_enabled() and not self.at_rest
        lay = self._lay_out(logits.shape, real, sequences, cu_seqlens, training=training)
        if training:
            self._expect_to_be_asked(replayed=replayed)
            flat = self._tie(flat, flat, chosen, lay, replayed=replayed)
        elif not self.training:
            self.watch(flat, chosen, mask=lay.mask)
        return flat.view(logits.shape)

    def _expect_to_be_asked(self, *, replayed: bool) -> None:
        """Warn once, after a first step, if the layer chooses without the method."""
        if self._asked or replayed or not self.traits.selects or self.last_total is None:
            return
        self._asked = True
        if not torch.compiler.is_compiling():
            logger.warning(
                "moebalance: %s: %r acts on the choice, but your layer has never asked what to "
                "rank, so it acts on nothing. Rank preference(logits, mask, training=…) where it "
                "is not None, or your affinities less `price`; or take a method that charges in "
                "the loss, such as PhiBalancing.",
                self.name,
                self.method,
            )
