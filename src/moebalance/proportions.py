"""Shares: the part ρ_e of the load that each expert is meant to get, where equal parts are not.

Experts of unequal size, devices of unequal speed, or experts that compute nothing call for loads
in given proportions. Every method and measure compares the load f with the shares so that equal
shares are no shares at all:

    f_e  becomes  f_e / (E ρ_e),        mean count  becomes  ρ_e · Σ_j c_j.

Shares are hyper-parameters: a tuple of positive numbers, one an expert, of which only the
proportions matter. A share of 0 is refused: its price would be infinite, and a router whose scores
are positive everywhere cannot pay it. An expert that shall get nothing is taken out of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Shares = tuple[float, ...]
"""A positive number for each expert; (4, 4, 1) is (4/9, 4/9, 1/9)."""


def settle_shares(owner: Any) -> None:
    """Turn the `shares` of a frozen dataclass into a tuple of numbers, and check them.

    Raises:
        TypeError: not numbers in a row.
        ValueError: fewer than two, or one that is not a finite number above 0.
    """
    if owner.shares is not None:
        object.__setattr__(owner, "shares", as_shares(owner.shares))


def as_shares(given: Iterable[float]) -> Shares:
    """A tuple of positive numbers.

    >>> as_shares([4, 4, 1])
    (4, 4, 1)
    """
    numbers = None if isinstance(given, str | Tensor) else given
    if not isinstance(numbers, Iterable):
        raise TypeError(
            f"shares={given!r}: give a tuple of positive numbers, one an expert, such as (4, 4, 1)."
        )
    shares = tuple(numbers)
    if any(isinstance(s, bool) or not isinstance(s, int | float) for s in shares):
        raise TypeError(f"shares={given!r}: all of them must be numbers.")
    if len(shares) < 2:
        raise ValueError(f"shares={given!r}: give one for each expert, of which there are several.")
    if not all(0 < s < math.inf for s in shares):
        raise ValueError(
            f"shares={given!r}: each must be a finite number above 0. An expert that shall get "
            "nothing is taken out of the layer (see docs/targets.md), or given a small share."
        )
    return shares


def check_shares(shares: Shares | None, num_experts: int) -> None:
    """Refuse shares of another number of experts.

    Raises:
        ValueError: says both numbers.
    """
    if shares is not None and len(shares) != num_experts:
        raise ValueError(
            f"shares of {len(shares)} experts for a layer of {num_experts}: give one number for "
            "each expert of the layer, those that compute nothing included."
        )


def fractions(shares: Shares, like: Tensor) -> Float[Tensor, " E"]:
    """ρ (E,), which sums to 1, where `like` (..., E) is and of its dtype.

    >>> fractions((4, 4, 1, 1), torch.zeros(4))
    tensor([0.4000, 0.4000, 0.1000, 0.1000])
    """
    check_shares(shares, like.shape[-1])
    total = math.fsum(shares)
    return constant([share / total for share in shares], dtype=like.dtype, device=like.device)


def per_share(load: Float[Tensor, "*batch E"], shares: Shares | None) -> Float[Tensor, "*batch E"]:
    """f_e / (E ρ_e): the load as even shares would have it; the load itself without shares.

    >>> per_share(torch.tensor([0.4, 0.4, 0.1, 0.1]), (4, 4, 1, 1))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return load if shares is None else load / (load.shape[-1] * fractions(shares, load))


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
