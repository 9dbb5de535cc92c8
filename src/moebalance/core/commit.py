"""The update of the states, once a step: all layers of one size at once.

L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moebalance.core.layer import LayerBalance
from moebalance.core.leaves import leaves, refill
from moebalance.core.packing import unpack
from moebalance.methods.base import Method, State
from moebalance.routing import as_number


@torch.no_grad()
def commit_rows(
    layers: Sequence[LayerBalance],
    totals: Float[Tensor, "L sums"],
    *,
    good: Bool[Tensor, ""] | None = None,
    replayed: Tensor | None = None,
) -> None:
    """Advance layers of one size under one method, in as many kernels as for one of them.

    Their running sums are the caller's to clear.

    Args:
        layers: on one device.
        totals: their packed sums, a row each; kept by the layers.
        good: whether to advance the states, where the host does not know it yet; None for yes.
        replayed: one number, above 0 if a batch of the step was routed by choices from elsewhere;
            None for no.
    """
    first = layers[0]
    method, experts = first.method, first.num_experts
    held = [[layer.get_buffer(name) for layer in layers] for name in first._state_names]
    written = [layer.last_step for layer in layers]
    values = list(totals[:, 2 * experts : 2 * experts + 2].unbind())
    if held:
        old = [torch.stack(tensors) for tensors in held]
        states = refill(first._template, iter(old))
        new = torch.vmap(method.update)(states, unpack(totals, method, experts))
        if replayed is not None:
            new = _held(method, states, new, replayed)
        for tensors, before, (_, after) in zip(held, old, leaves(new), strict=True):
            after = after if good is None else torch.where(good, after, before)
            written += tensors
            values += after.unbind()
    # In place: compiled graphs and CUDA graphs hold on to these very tensors.
    torch._foreach_copy_(written, values)
    for layer, total in zip(layers, totals.unbind(), strict=True):
        layer.last_total = total


def _held(method: Method, states: State, new: State, replayed: Tensor) -> State:
    """The new states, where what integrates stays if the choice was not the router's own."""
    held = method.held(states, new)
    seen = as_number(replayed.reshape(()))
    if held is new or (isinstance(seen, float) and not seen):
        return new
    replayed = replayed.reshape(()).to(next(leaves(new))[1].device) > 0
    pairs = zip(leaves(held), leaves(new), strict=True)
    kept = [h if h is n else torch.where(replayed, h, n) for (_, h), (_, n) in pairs]
    return refill(new, iter(kept))
