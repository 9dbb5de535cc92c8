"""One price a class of tokens, for example one for text and one for images.

The classes share the experts and the router's weight. Each class has a load of its own, so each has
a memory and a price of its own: a price that evens out their sum can leave every image token on a
few experts. One `BalancedRouter` a class does it, each with the other classes masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.gates import on_host
from moebalance.methods.base import Method
from moebalance.router import BalancedRouter
from moebalance.routing import real_tokens


class PerClassRouter(torch.nn.Module):
    """Top-k routing in which each class of tokens is balanced by itself.

    The routers are layers of their own to `attach`, metrics and checkpoints, named
    `router.text`, `router.image`. Each charges its class at the full strength, however few tokens
    the class has. A batch costs one top-k a class.

    Args:
        method: the method of every class.
        num_experts: E.
        top_k: K, experts per token.
        classes: names of the classes, at least two.
        name: what errors and logs call this layer.
        options: further arguments of `BalancedRouter`, such as `gate` or `normalize`.

    Raises:
        ValueError: fewer than two classes or a name twice, or as `BalancedRouter`.

    >>> from moebalance import LossFree
    >>> router = PerClassRouter(LossFree(), 8, 2, classes=["text", "image"])
    >>> weights, experts = router(torch.randn(5, 8), torch.tensor([0, 0, 0, 1, 1]))
    >>> weights.shape, experts.shape
    (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        method: Method,
        num_experts: int,
        top_k: int,
        *,
        classes: Sequence[str],
        name: str = "router",
        **options: Any,
    ) -> None:
        super().__init__()
        if len(set(classes)) < max(2, len(classes)):
            raise ValueError(f"classes={list(classes)!r}: give two names or more, each once.")
        self.name = name
        self.routers = torch.nn.ModuleDict(
            {
                each: BalancedRouter(method, num_experts, top_k, name=f"{name}.{each}", **options)
                for each in classes
            }
        )

    def forward(
        self,
        logits: Float[Tensor, "*tokens E"],
        classes: Int[Tensor, "*tokens"],
        mask: Bool[Tensor, "*tokens"] | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "*tokens K"], Int[Tensor, "*tokens K"]]:
        """Choose experts and weigh them, each token by the price of its class.

        Args:
            logits: (T, E) or (B, S, E), from the router's linear map.
            classes: (T,) or (B, S), the number of each token's class, from 0.
            mask: as in `BalancedRouter`; padding may have any class.
            options: further arguments of `BalancedRouter.forward`.

        Returns:
            Weights and experts, as `BalancedRouter`.

        Raises:
            ValueError: classes of another shape or type, or none of these classes; or as
                `BalancedRouter`.
        """
        self._check(logits, classes)
        if mask is not None and mask.shape != classes.shape:  # it would be broadcast
            raise ValueError(
                f"{self.name}: mask of shape {tuple(mask.shape)} for classes of shape "
                f"{tuple(classes.shape)}: give one value for each token."
            )
        real = None if mask is None else real_tokens(mask, f"{self.name}: mask")
        found: tuple[Tensor, Tensor] | None = None
        for number, router in enumerate(self.routers.values()):
            here = classes == number
            weights, experts = router(logits, here if real is None else here & real, **options)
            if found is None:
                found = weights, experts
                continue
            row = here.unsqueeze(-1)
            found = torch.where(row, weights, found[0]), torch.where(row, experts, found[1])
        assert found is not None
        return found

    def _check(self, logits: Tensor, classes: Tensor) -> None:
        """Refuse classes that do not fit; values are looked at on a CPU only."""
        if classes.shape != logits.shape[:-1] or classes.is_floating_point():
            raise ValueError(
                f"{self.name}: classes of shape {tuple(classes.shape)} and {classes.dtype} for "
                f"logits of shape {tuple(logits.shape)}: give a whole number for each token."
            )
        if not on_host(classes) or not classes.numel():
            return
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= len(self.routers):
            raise ValueError(
                f"{self.name}: classes from {low} to {high}, but there are {len(self.routers)}: "
                f"{', '.join(self.routers)}. Give padding any of these, and a mask."
            )
