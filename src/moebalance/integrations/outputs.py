"""The tensors that a model returns, however it packs them."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors(output: Any) -> list[Tensor]:
    """Each tensor once, also in nested containers and in the fields of an object."""
    found = []
    for leaf in tree_leaves(output):
        inside = [leaf] if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", {}).values()
        found += [value for value in inside if isinstance(value, Tensor)]
    return list({id(tensor): tensor for tensor in found}.values())
