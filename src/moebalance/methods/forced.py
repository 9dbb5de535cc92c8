"""Forced routing: measure what a perfect, a random or a bad balance is worth in throughput.

    with mb.attach(model, Forced("balanced")) as balancing:   # the upper bound of any method
        tokens_per_second(model)
    with mb.attach(model, Forced("skewed", hot=0.5)) as balancing:
        tokens_per_second(model)

The choice follows a token's place in its batch, not its router. Weights stay the router's, so the
model computes, sends and learns as much as it does otherwise. Let T tokens choose K of E experts:

    "balanced"    token t gets experts t, t + 1, …, t + K − 1 (mod E)    MaxVio 0 if E divides T
    "skewed"      as "balanced", and a part `hot` of the tokens          MaxVio hot · (E/K − 1)
                  get expert 0 in place of their last one
    "random"      K different experts, uniform                           MaxVio of chance

A pattern depends on nothing but shapes: activation checkpointing recomputes the same choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.gates import Gate
from moebalance.methods.base import Method, State, Traits

Pattern = Literal["balanced", "random", "skewed"]

_GOLDEN = 0.6180339887498949  # multiples of it, mod 1, fill [0, 1) evenly


@dataclass(frozen=True, repr=False)
class Forced(Method):
    """Choose experts by a fixed pattern, in training and in evaluation. Not for training a model.

    It has no state. A method's own state is as safe as its handle: detach that, attach this one,
    measure, detach, and attach the method again with `load_state_dict`.

    Args:
        pattern: "balanced", "random" or "skewed".
        hot: for "skewed", the part of the tokens in [0, 1] that is forced onto expert 0.

    Raises:
        ValueError: no such pattern, or `hot` out of range.

    >>> import moebalance as mb
    >>> router = mb.BalancedRouter(Forced("balanced"), num_experts=4, top_k=2)
    >>> router(torch.randn(3, 4))[1].sort().values.tolist()
    [[0, 1], [1, 2], [2, 3]]
    """

    pattern: Pattern = "balanced"
    hot: float = 0.5

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern={self.pattern!r}: must be one of {get_args(Pattern)}.")
        if not 0 <= self.hot <= 1:
            raise ValueError(f"hot={self.hot!r}: must be a part of the tokens, in [0, 1].")

    @property
    def traits(self) -> Traits:
        """A token's place in its micro-batch decides."""
        return super().traits._replace(coupling="batch")

    def preference(
        self,
        state: State,
        gate: Gate,
        logits: Float[Tensor, "T E"],
        *,
        mask: Bool[Tensor, "T"] | None,
        training: bool,
    ) -> Float[Tensor, "T E"]:
        """Scores (T, E) whose K largest are the pattern's, for every K."""
        tokens, experts = logits.shape
        token = torch.arange(tokens, device=logits.device).unsqueeze(-1)  # (T,1)
        expert = torch.arange(experts, device=logits.device)  # (E,)
        if self.pattern == "random":
            return _noise(token * experts + expert)
        if mask is not None:  # padding would leave holes in the cycle
            token = mask.cumsum(0).unsqueeze(-1) - 1
        distance = (expert - token) % experts  # 0 for the first expert of a token
        if self.pattern == "skewed":
            hot = (token * _GOLDEN) % 1 < self.hot
            distance = torch.where(hot & (expert == 0), -1, distance)
        return -distance.float()


def _noise(number: Tensor) -> Float[Tensor, "..."]:
    """A number in [0, 1) that looks random, for each whole number."""
    mixed = number * 0x9E3779B1 & 0x7FFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D & 0x7FFFFFFF
    mixed = (mixed ^ mixed >> 12) * 0x297A2D39 & 0x7FFFFFFF
    return (mixed ^ mixed >> 15) / 2**31
