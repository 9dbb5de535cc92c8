"""Count and charge where a router of another's has formed its affinities itself.

T tokens, E experts, K chosen experts per token.

    the router    z (T,E) → a = softmax(z) or σ(z) → top-k or gather → weights (T,K)
    its backward  ∂/∂weights → ∂/∂a (T,E) → ∂/∂z
                                  ↑ count the batch, and add the charge here

Autograd keeps a for the router's own backward pass. Where the graph has such a node, the batch is
counted and charged as the gradient of a comes by. Nothing is formed a second time, and nothing more
is kept. Elsewhere `core.autograd.tie` takes the logits and forms a itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.graph import Node

from moebalance.core.autograd import Pass, settle
from moebalance.gates import Gate, Sigmoid, Softmax
from moebalance.routing import count, real_rows

_NODES: dict[type[Gate], str] = {Softmax: "SoftmaxBackward0", Sigmoid: "SigmoidBackward0"}
_FRESH = ("TopkBackward0", "GatherBackward0")
"""What takes the chosen affinities out. Its gradient is a new tensor, which may be added to."""
_CASTS = ("ToCopyBackward0",)
# Not public in torch, like a node's `_input_metadata`: where a release lacks one of them,
# affinities are formed anew.
_current_node = getattr(torch._C, "_current_autograd_node", None)
_packing_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_FAR = 16
"""Nodes to look at between the weights and the affinities: a scale, a sum, a division, casts."""


def find(carrier: Tensor, logits: Float[Tensor, "T E"], gate: Gate) -> Node | None:
    """The node of the router's graph that formed the affinities (T, E) of exactly these logits."""
    if torch.compiler.is_compiling():  # Dynamo knows no graph to look at
        return None
    name = _NODES.get(type(gate))
    if name is None or carrier.grad_fn is None or _kept_elsewhere():
        return None
    source = _source(logits)
    ahead: list[tuple[Any, Any]] = [(None, carrier.grad_fn)]
    for _ in range(_FAR):
        if not ahead:
            return None
        after, node = ahead.pop(0)
        if node.name() == name and _taken(after) and _forms(node, source, logits.dim()):
            return cast(Node, node)
        ahead += [(node, before) for before, _ in node.next_functions if before is not None]
    return None


def join(
    node: Node,
    how: Pass,
    experts: Int[Tensor, "T K"],
    *,
    mask: Bool[Tensor, "T"] | None = None,
) -> None:
    """Count and charge this batch when the gradient of its affinities reaches `node`.

    Args:
        node: from `find`.
        how: the layer, with a method whose price comes `from_sums`.
        experts: (T, K), the choice.
        mask: (T,) True for real tokens, or None.
    """
    # The hook must not hold the node, which holds the hook: the graph would never be freed.
    node.register_prehook(_charging(how._replace(fused=False), experts, mask))


def _charging(
    how: Pass, experts: Tensor, mask: Tensor | None
) -> Callable[[tuple[Tensor | None, ...]], tuple[Tensor, ...] | None]:
    @torch.no_grad()
    def charge(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
        assert _current_node is not None  # or `find` had found nothing
        affinities: Tensor = _current_node()._saved_result  # (T,E)
        device = affinities.device.type
        exact = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if exact else nullcontext():
            real = real_rows(affinities, mask)
            row_scale = how.gate.row_scale(real)
            packed, sums = count(real, row_scale, experts, mask)
            price = settle(how.begun(), packed, len(experts), mask, sums)
            if price is None:
                return None
            (gradient,) = gradients
            if gradient is None:  # the function downstream sends none
                gradient = torch.zeros_like(affinities)
            how.gate.add_price_gradient(gradient, price, real, row_scale, mask)
            return (gradient,)

    return charge


def _kept_elsewhere() -> bool:
    """Whether saved tensors are packed by hooks, as in checkpointing: they unpack only once."""
    if _current_node is None or _packing_hooks is None or not hasattr(Node, "_input_metadata"):
        return True
    return _packing_hooks(False) is not None


def _taken(node: Any) -> bool:
    """Whether this node takes the chosen affinities out."""
    return node is not None and node.name() in _FRESH


def _source(tensor: Tensor) -> Any:
    """What identifies a tensor in a graph, before any cast: its node, or for a leaf the tensor."""
    node = _before_casts(tensor.grad_fn)
    return tensor if node is None else getattr(node, "variable", node)


def _forms(node: Any, source: Any, dims: int) -> bool:
    """Whether a softmax over the last axis, or a sigmoid, is of the tensor that `source` names."""
    if hasattr(node, "_saved_dim") and node._saved_dim not in (dims - 1, 2**64 - 1):
        return False
    # In half precision a count stops at 256; such affinities are formed anew, in float32.
    if node._input_metadata[0].dtype not in (torch.float32, torch.float64):
        return False
    before = _before_casts(node.next_functions[0][0])
    return before is not None and getattr(before, "variable", before) is source


def _before_casts(node: Any) -> Any:
    while node is not None and node.name() in _CASTS:
        node = node.next_functions[0][0]
    return node
