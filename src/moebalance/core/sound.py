"""Whether saved numbers can be trained with: a file from elsewhere may hold anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moebalance.core.leaves import leaves
from moebalance.gates import Gate
from moebalance.methods.base import MOST_PRICE, Method, State, beyond, observe
from moebalance.routing import Batch, Routing, route

MOST = 1e15
"""Above every sum of a training run, and its square is still a float32."""

COUNTS = "last_step"
"""The one tensor of a layer that has nothing to do with its experts: tokens and batches."""

MOST_STEPS = 2**53
"""Whole numbers below it are exact in float64."""

_TRAIN_AGAIN = "Take an earlier checkpoint, or start without a state."


def steps_problem(steps: Any) -> str:
    """What is wrong with a saved number of steps; empty if nothing."""
    if type(steps) is int and 0 <= steps < MOST_STEPS:
        return ""
    shown = repr(steps) if type(steps) is not int or abs(steps) < 10**30 else "a huge number"
    return f"it says steps={shown[:60]}: must be a whole number from 0 to 2**53. {_TRAIN_AGAIN}"


def tensors_problem(tensors: Any, own: Mapping[str, Tensor] | None = None) -> str:
    """What is wrong with the tensors that were saved of one layer; empty if nothing.

    Args:
        tensors: by name.
        own: the tensors of the layer that takes them up, for their dtypes; None for float32.
    """
    if not isinstance(tensors, Mapping):
        return f"it holds {type(tensors).__name__} where a table of tensors was due. {_TRAIN_AGAIN}"
    for name, tensor in tensors.items():
        needed = own[name].dtype if own is not None and name in own else torch.float32
        problem = _problem(tensor, needed)
        if not problem and name == COUNTS and bool((tensor < 0).any()):
            problem = "counts fewer than 0 tokens or batches"
        if problem:
            return f"its {name} {problem}. {_TRAIN_AGAIN}"
    return ""


def check_price(price: Tensor, name: str) -> None:
    """Refuse a model's own selection price (E,) that no choice can be made under.

    Raises:
        ValueError: it is not finite, or larger than `MOST_PRICE`.
    """
    problem = "" if price.is_meta else _problem(price.float(), torch.float32)
    if not problem and not price.is_meta:
        problem = beyond("", price).strip()
    if problem:
        raise ValueError(f"The selection bias of {name} is refused: it {problem}. {_TRAIN_AGAIN}")


def _problem(tensor: Any, needed: torch.dtype) -> str:
    if not isinstance(tensor, Tensor):
        return f"is {type(tensor).__name__}, not a tensor"
    if tensor.dtype != needed or tensor.layout is not torch.strided:
        return f"is {tensor.dtype} ({tensor.layout}), and must be a plain {needed} tensor"
    if tensor.is_meta:
        return "has no values (it is on the meta device)"
    if not bool(torch.isfinite(tensor).all()):
        return "has NaN or infinite values"
    most = tensor.abs().max().item() if tensor.numel() else 0.0
    return f"has values as large as {most:.1e}; at most {MOST:.0e} is possible" * (most > MOST)


def trial_problem(method: Method, state: State, gate: Gate, num_experts: int) -> str:
    """What goes wrong if a method goes on from a state; empty if nothing.

    The parts of the state judge themselves first (`problem()`, where they have it). Then the method
    prices and ends an even and a lopsided batch, which finds what no look at the tensors alone can:
    for example a price that decides every choice.
    """
    for part in _parts(state):
        found = part.problem() if hasattr(part, "problem") else ""
        if found:
            return f"{found}. {_TRAIN_AGAIN}"
    for what, value in _trial(method, state, gate, num_experts):
        if not bool(torch.isfinite(value).all()):
            return f"{what} would be NaN or infinite under it. {_TRAIN_AGAIN}"
        if "price" in what and value.abs().max().item() > MOST_PRICE:
            return (
                f"{what} would be as large as {value.abs().max().item():.1e} under it; at most "
                f"{MOST_PRICE:.0e} is possible. {_TRAIN_AGAIN}"
            )
    return ""


def _trial(
    method: Method, state: State, gate: Gate, num_experts: int
) -> Iterator[tuple[str, Tensor]]:
    own = torch.arange(num_experts).unsqueeze(-1)  # (T,1), token t to expert t
    with torch.device("cpu"), torch.no_grad():
        for experts in (own, torch.zeros_like(own)):
            logits = torch.zeros(num_experts, num_experts).scatter(-1, experts, 4.0)
            yield from _tried(method, state, route(logits, experts, gate))


def _tried(method: Method, state: State, routing: Routing) -> Iterator[tuple[str, Tensor]]:
    sums = observe(method, state, routing)
    batch = Batch(routing, sums, sums)
    named = {
        "the selection price": method.selection_price(state),
        "the selection price in nats": method.price_in_nats(state),
        "the price in the loss": method.loss_price(state, batch),
        "the router's gradient": method.penalty_gradient(state, batch),
    }
    yield from ((what, value) for what, value in named.items() if value is not None)
    for _, value in leaves(method.update(state, sums)):
        yield "the next state", value


def _parts(state: State) -> Iterator[Any]:
    """A nested state and the states in it, from the outside in."""
    if not isinstance(state, Tensor):
        yield state
        for part in state:
            yield from _parts(part)


def readable(tensor: Any, own: Tensor | None) -> bool:
    """Whether values can be looked at: none are there for a part of a tensor, or on meta."""
    if own is None or own.is_meta or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return False
    return not tensor.is_meta and tensor.shape == own.shape
