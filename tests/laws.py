"""Every method and gate as test parameters, and when two results are the same, for the laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from cases import (
    GATES,
    METHODS,
    OF_EIGHT,
    tensors,
)
from moebalance import Method
from moebalance.routing import Routing

every_method = pytest.mark.parametrize(
    "method", [pytest.param(method, id=name) for name, method in METHODS.items()]
)
every_method_of_eight = pytest.mark.parametrize(
    "method",
    [pytest.param(method, id=name) for name, method in {**METHODS, **OF_EIGHT}.items()],
)
every_gate = pytest.mark.parametrize(
    "gate", [pytest.param(gate, id=name) for name, gate in GATES.items()]
)
few = settings(max_examples=4, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
sizes = st.tuples(st.integers(1, 40), st.sampled_from([2, 3, 8, 17]), st.integers(1, 2))


def close(a, b, tolerance: float = 1e-6) -> None:
    """Tensors of `a` and `b` agree relative to the largest entry."""
    left, right = tensors(a), tensors(b)
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        scale = max(y.abs().max().item(), 1e-12) if y.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale)


def identical(a, b) -> None:
    left, right = tensors(a), tensors(b)
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def preference(method: Method, state, routing: Routing) -> torch.Tensor | None:
    return method.preference(state, routing.gate, routing.logits, mask=routing.mask, training=True)


def columns(tensor: torch.Tensor | None, order: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[..., order]
