"""Router orthogonality: keep the rows of a router's weight apart.

With W (E, D), one row an expert, and Ŵ its rows of length one,

    gram     Σ_ij |W Wᵀ − I|_ij          SimBal
    cosine   mean_ij (Ŵ Ŵᵀ − I)_ij²      ERNIE 4.5

This is a third lever. A price in the loss and a price before top-k act on what tokens do; this acts
on the weight itself and reads no token, so it needs no state and is no `Method`. It makes experts
look for unlike tokens and does not even out the load. It composes with every method.

Sources: SimBal, arXiv 2506.14038, strength 0.1 in marin; Baidu, 2025, ERNIE 4.5 technical report,
strength 0.01.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.gates import at_least_float32


def orthogonality(
    weight: Float[Tensor, "E D"], form: Literal["cosine", "gram"] = "cosine"
) -> Float[Tensor, ""]:
    """How far the rows of a router's weight are from orthogonal; differentiable, float32 or wider.

    Add it to the loss, once a batch, times a strength:

        loss = loss + 0.01 * sum(map(orthogonality, weights))

    Args:
        weight: (E, D), one row an expert.
        form: "cosine" looks at angles only; "gram" also wants rows of length one.

    Raises:
        TypeError: not a tensor of floating-point numbers, as a quantised weight is not.
        ValueError: not a matrix of at least two rows; or an unknown form. A weight that DeepSpeed
            ZeRO-3 has partitioned has no rows here: gather it first.

    >>> orthogonality(torch.eye(3, 5)).item()
    0.0
    >>> orthogonality(torch.ones(2, 4), "cosine").item()
    0.5
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight of type {_type(weight)}: must be a floating-point tensor (E, D).")
    if weight.dim() != 2 or len(weight) < 2:
        raise ValueError(
            f"weight of shape {tuple(weight.shape)}: must be (E, D), a row for each of two experts "
            "or more. Gather a partitioned weight first."
        )
    rows = at_least_float32(weight)
    if form == "cosine":
        # As ERNIE does it: a row of zeros has no direction, and stays one of zeros.
        rows = torch.nn.functional.normalize(rows, dim=1)
    elif form != "gram":
        raise ValueError(f"form={form!r}: must be 'cosine' or 'gram'.")
    excess = rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return excess.square().mean() if form == "cosine" else excess.abs().sum()


def _type(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
