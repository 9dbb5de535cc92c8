"""What the gradient of the logits tells of a `top_k` or a gate that was named wrongly.

The layer between the logits and the loss is the user's, and nobody sees its choice. But the
gradient that comes back from it depends on it:

- Where the weights are normalised, or come from sigmoids, it is 0 outside of the chosen experts.
- Through a softmax, its entries for one token sum to 0.

It is looked at once, in the first training batch, and what is found is a warning: a router noise,
a limit of capacity or a loss of the layer's own may be the reason.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.integrations.named.finding import Rule

logger = logging.getLogger("moebalance")

_ROWS = 8  # fewer tokens prove nothing
_MOST = 0.9  # part of the tokens that must agree


class Witness:
    """Look at the first gradient of one router's logits.

    Args:
        name: of the router.
        how: what the user says of the layer.
    """

    def __init__(self, name: str, how: Rule) -> None:
        self.name, self.how, self.heard = name, how, False

    def listen(self, logits: Tensor, experts: Tensor, mask: Tensor | None) -> None:
        """Look at the gradient of these logits, if none was looked at before."""
        if self.heard or torch.compiler.is_compiling() or not logits.requires_grad:
            return
        hear: Any = partial(self._hear, experts, mask)
        logits.register_hook(hear)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _hear(self, experts: Tensor, mask: Tensor | None, gradient: Tensor) -> None:
        if self.heard:
            return
        self.heard = True
        found = contradiction(gradient, experts, mask, self.how)
        if found is not None:
            logger.warning(
                "moebalance: %s does not seem to choose as attach was told: %s. A loss or a noise "
                "of the layer's own, or a limit of capacity, can be the reason too; a layer whose "
                "choice is its own calls CountAndCharge.",
                self.name,
                found,
            )


def contradiction(
    gradient: Float[Tensor, "T E"],
    experts: Int[Tensor, "T K"],
    mask: Bool[Tensor, "T"] | None,
    how: Rule,
) -> str | None:
    """What this gradient says against the rule, in words; None if nothing."""
    size = gradient.abs().float()
    rounding = 1e-3 if gradient.dtype in (torch.float32, torch.float64) else 0.05
    told = size.sum(dim=-1) > 1e-3 * size.sum(dim=-1).max()
    if mask is not None:
        told &= mask
    gradient, size, experts = gradient[told].float(), size[told], experts[told]
    if len(size) < _ROWS:
        return None
    used = size > rounding * size.amax(dim=-1, keepdim=True)  # (T,E)
    return _choice(used, experts, how) or _gate(gradient, size, used, rounding, how)


def _choice(used: Bool[Tensor, "T E"], experts: Int[Tensor, "T K"], how: Rule) -> str | None:
    numbers, num_experts = used.sum(dim=-1), used.shape[-1]
    usual = int(numbers.mode().values)
    if usual == num_experts or (numbers == usual).float().mean() < _MOST:
        return None
    if usual != how.top_k:
        return f"{usual} experts of a token get a gradient, and top_k={how.top_k}"
    foreign = used & ~torch.zeros_like(used).scatter_(-1, experts, True)
    if foreign.any(dim=-1).float().mean() > 1 - _MOST:
        return "it chooses other experts than the top-k of its logits"
    return None


def _gate(
    gradient: Float[Tensor, "T E"],
    size: Float[Tensor, "T E"],
    used: Bool[Tensor, "T E"],
    rounding: float,
    how: Rule,
) -> str | None:
    """Whether the entries of a token sum to 0, as they do through a softmax."""
    rest = (gradient.sum(dim=-1).abs() / size.sum(dim=-1)).median()
    if how.gate.sums_to_one and rest > 10 * rounding:
        return f"the gradient of a token does not sum to 0, so that the gate is not {how.gate}"
    if not how.gate.sums_to_one and rounding < 0.01 and rest < 1e-5 and used.sum(-1).min() > 1:
        return f"the gradient of each token sums to 0, so that the gate is Softmax, not {how.gate}"
    return None
