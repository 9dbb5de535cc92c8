"""How much of the gradient at the router's logits is balancing: ‖balance‖ / ‖task‖.

    logits z ──────────────→ the model's own path      gradient: the task's part
       └──── z, a branch ──→ the balancing             gradient: the balancing's part

The hook on z sees the sum of both, the hook on the branch the balancing's part alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger("moebalance")


class Weighing:
    """Squared norms of the two gradients at one layer's logits, over the tokens of a step."""

    def __init__(self) -> None:
        self._running: list[Tensor] = []
        self._last: list[Tensor] = []

    def branch(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Return the logits for the balancing alone to use; the rest goes on with the given ones.

        Raises:
            RuntimeError: under torch.compile, which does not call hooks on every backward.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "weigh_gradient() measures in eager mode: compile the model without it, or leave "
                "torch.compile out for the steps that you want to measure."
            )
        balance: list[Tensor] = []
        branch = logits.view_as(logits)
        # A method that charges nothing sends None, and a task that sends nothing too.
        branch.register_hook(  # type: ignore[no-untyped-call]
            lambda part: None if part is None else balance.append(part.detach())
        )
        logits.register_hook(  # type: ignore[no-untyped-call]
            lambda both: None if both is None else self._add(both, balance)
        )
        return branch

    def close(self) -> None:
        """End the step."""
        self._last, self._running = self._running, []

    def discard(self) -> None:
        """Forget the batches since the last step."""
        self._running = []

    def norms(self) -> tuple[float, float] | None:
        """Of the balancing's gradient and the task's in the last step; None without a batch."""
        if not self._last:
            return None
        balance, task = torch.stack(self._last).sum(dim=0).sqrt().tolist()
        return balance, task

    @torch.no_grad()
    def _add(self, total: Tensor, balance: list[Tensor]) -> None:
        # float32: squares of bfloat16 gradients underflow.
        part = balance.pop().float() if balance else torch.zeros_like(total, dtype=torch.float32)
        task = total.float() - part
        self._running.append(torch.stack([part.square().sum(), task.square().sum()]))


def gradient_ratio(layers: Iterable[tuple[str, Weighing]]) -> dict[str, float]:
    """`gradient_ratio` over all layers, and the largest of one layer, `gradient_ratio_worst`.

    A layer whose task sent no gradient is left out. If there is no other, a warning says so.
    """
    found = {name: norms for name, layer in layers if (norms := layer.norms()) is not None}
    known = {name: norms for name, norms in found.items() if norms[1] > 0}
    if found and not known:
        logger.warning(
            "moebalance: weigh_gradient() saw no task gradient at the logits of %s (of %d layers): "
            "the model routes by other logits than these, or the loss does not depend on them.",
            next(iter(found)),
            len(found),
        )
    if not known:
        return {}
    balance, task = (math.hypot(*part) for part in zip(*known.values(), strict=True))
    worst = max(b / t for b, t in known.values())
    return {"gradient_ratio": balance / task, "gradient_ratio_worst": worst}
