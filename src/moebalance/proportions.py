"""Proportions ρ: the part of the load that each expert should get, where parts are not equal.

Examples: experts of unequal size, devices of unequal speed, experts that compute nothing. Methods
and metrics then use load per proportion, so that equal proportions change nothing:

    f_e  becomes  f_e / (E ρ_e),        mean count  becomes  ρ_e · Σ_j c_j.

You give a tuple of positive numbers, one for each expert. Only their ratios matter. 0 is refused:
its price would be infinite, and router scores are positive everywhere. Remove an expert that should
get nothing from the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Proportions = tuple[float, ...]
"""A positive number for each expert; (4, 4, 1) is (4/9, 4/9, 1/9)."""


def settle_proportions(owner: Any) -> None:
    """Turn the `proportions` of a frozen dataclass into a tuple of numbers, and check them.

    Raises:
        TypeError: not numbers in a row.
        ValueError: fewer than two, or one that is not a finite number above 0.
    """
    if owner.proportions is not None:
        object.__setattr__(owner, "proportions", as_proportions(owner.proportions))


def as_proportions(given: Iterable[float]) -> Proportions:
    """A tuple of positive numbers.

    >>> as_proportions([4, 4, 1])
    (4, 4, 1)
    """
    numbers = None if isinstance(given, str | Tensor) else given
    if not isinstance(numbers, Iterable):
        raise TypeError(
            f"proportions={given!r}: give a tuple of positive numbers, one for each expert, "
            "for example (4, 4, 1)."
        )
    proportions = tuple(numbers)
    if any(isinstance(s, bool) or not isinstance(s, int | float) for s in proportions):
        raise TypeError(f"proportions={given!r}: all of them must be numbers.")
    if len(proportions) < 2:
        raise ValueError(
            f"proportions={given!r}: give one for each expert, of which there are several."
        )
    if not all(0 < s < math.inf for s in proportions):
        raise ValueError(
            f"proportions={given!r}: each must be a finite number above 0. Remove an expert that "
            "should get nothing from the layer (see docs/targets.md), or give it a small number."
        )
    return proportions


def check_proportions(proportions: Proportions | None, num_experts: int) -> None:
    """Refuse shares of another number of experts.

    Raises:
        ValueError: says both numbers.
    """
    if proportions is not None and len(proportions) != num_experts:
        raise ValueError(
            f"proportions for {len(proportions)} experts, but the layer has {num_experts}: give "
            "one number for each expert of the layer, also for experts that compute nothing."
        )


def fractions(proportions: Proportions, like: Tensor) -> Float[Tensor, " E"]:
    """ρ (E,), which sums to 1, where `like` (..., E) is and of its dtype.

    >>> fractions((4, 4, 1, 1), torch.zeros(4))
    tensor([0.4000, 0.4000, 0.1000, 0.1000])
    """
    check_proportions(proportions, like.shape[-1])
    total = math.fsum(proportions)
    return constant([share / total for share in proportions], dtype=like.dtype, device=like.device)


def per_proportion(
    load: Float[Tensor, "*batch E"], proportions: Proportions | None
) -> Float[Tensor, "*batch E"]:
    """f_e / (E ρ_e): the load as even shares would have it; the load itself without shares.

    >>> per_proportion(torch.tensor([0.4, 0.4, 0.1, 0.1]), (4, 4, 1, 1))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return load if proportions is None else load / (load.shape[-1] * fractions(proportions, load))


def constant(values: Sequence[int | float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of numbers known beforehand, made on its device, a kernel a run of equal ones.

    Nothing is copied from the host, which a CUDA graph could not record, and nothing is kept.
    """
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    parts = [torch.full((count,), value, dtype=dtype, device=device) for value, count in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
