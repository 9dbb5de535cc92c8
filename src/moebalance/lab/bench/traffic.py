"""What a piece of code makes the machine do: kernels started, bytes moved, bytes kept for backward.

Counted by watching every operation pass the dispatcher, hence the same on every machine and in
every run, unlike time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MOVE_NOTHING = {
    "aten::view", "aten::_unsafe_view", "aten::expand", "aten::detach", "aten::unsqueeze",
    "aten::squeeze", "aten::split_with_sizes", "aten::unbind", "aten::select", "aten::slice",
    "aten::as_strided", "aten::alias", "aten::t", "aten::transpose", "aten::empty", "aten::permute",
    "aten::lift_fresh", "aten::new_empty", "aten::empty_like",
}  # fmt: skip
_FACTORIES = {"new_ones", "new_zeros", "new_full", "zeros_like", "ones_like", "full_like"}
_SPARSE = {"aten::scatter", "aten::scatter_", "aten::scatter_add", "aten::scatter_add_"}


@dataclass
class Traffic:
    """What was seen.

    Attributes:
        large: names of the kernels that touched a tensor of at least as many elements as tokens.
        small: names of all others.
        bytes: read and written by the large ones; a broadcast operand counts as what it occupies,
            a gather or scatter as the places that it touches.
    """

    large: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    bytes: int = 0


class _Watch(TorchDispatchMode):
    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.seen = rows, Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _MOVE_NOTHING:
            return result
        written = {a.name for a in func._schema.arguments if a.is_out}  # and not read
        read = {key: value for key, value in (kwargs or {}).items() if key not in written}
        given = [t for t in tree_leaves((args, read)) if isinstance(t, Tensor)]
        if name.removeprefix("aten::") in _FACTORIES:
            given = []  # they look at its shape alone
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if max((t.numel() for t in given + made), default=0) < self.rows:
            self.seen.small.append(name)
            return result
        self.seen.large.append(name)
        if name in _SPARSE:
            index, *source = given[1:]  # the source may be a number
            self.seen.bytes += _occupied(index) + 2 * sum(map(_occupied, source))
        elif name == "aten::gather":
            self.seen.bytes += _occupied(given[-1]) + 2 * sum(map(_occupied, made))
        else:
            self.seen.bytes += sum(map(_occupied, given)) + sum(map(_occupied, made))
        return result


def traffic(call: Callable[[], Any], *, rows: int) -> Traffic:
    """Run `call` twice, the first time to warm it up, and watch the second.

    Args:
        call: what to watch.
        rows: number of tokens: kernels on tensors of at least so many elements are large.
    """
    call()
    with _Watch(rows) as watch:
        call()
    found: Traffic = watch.seen
    return found


def kept_for_backward(call: Callable[[], Any]) -> int:
    """Bytes that autograd keeps, every storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(kept.values())


def _occupied(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
