"""A method's state is a nested tuple of tensors: its leaves, and how to put them back."""

from collections.abc import Iterator

from torch import Tensor

from moebalance.methods.base import State


def leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name the tensors of a nested tuple or NamedTuple, in order."""
    if isinstance(state, Tensor):
        yield prefix.removesuffix("_"), state
        return
    for field, value in zip(getattr(state, "_fields", range(len(state))), state, strict=True):
        yield from leaves(value, f"{prefix}{field}_")


def refill(template: State, tensors: Iterator[Tensor | None]) -> State:
    """Put tensors, in `leaves` order, into the shape of `template`."""
    if isinstance(template, Tensor):
        return next(tensors)
    parts = [refill(part, tensors) for part in template]
    return type(template)(*parts) if hasattr(template, "_fields") else tuple(parts)
