"""How the tokens of a batch lie in sequences: equally long ones in order, or packed ones.

Methods that look at single sequences get rows of one length. Packed sequences of 5 and 7 tokens
become two rows of 7 places, of which the first has 2 without a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Lay(NamedTuple):
    """How a batch of T tokens lies.

    Attributes:
        mask: (T,) True for real tokens; None if all are.
        sequences: number of equally long sequences, in order; or of rows of `places`.
        places: (sequences, longest) the token at each place of a packed sequence; None if the
            sequences are equally long.
        valid: (sequences, longest) False where there is none.
    """

    mask: Bool[Tensor, "T"] | None
    sequences: int = 1
    places: Int[Tensor, "sequences longest"] | None = None
    valid: Bool[Tensor, "sequences longest"] | None = None

    def arranged(
        self, logits: Float[Tensor, "T E"], experts: Int[Tensor, "T K"]
    ) -> tuple[Float[Tensor, "rows E"], Int[Tensor, "rows K"], Bool[Tensor, "rows"] | None]:
        """Logits, choice and mask with sequences of equal length, one after the other."""
        if self.places is None or self.valid is None or not len(logits):
            return logits, experts, self.mask
        index = self.places.reshape(-1).to(logits.device)
        valid = self.valid.reshape(-1).to(logits.device)
        mask = valid if self.mask is None else valid & self.mask[index]
        return logits[index], experts[index], mask


def packed(
    bounds: Int[Tensor, "bounds"],
    tokens: int,
    mask: Bool[Tensor, "T"] | None,
    *,
    rows: bool,
    name: str,
) -> Lay:
    """Lay out packed sequences.

    Args:
        bounds: (N + 1,), for example [0, 5, 12]. Tokens behind the last entry are padding.
        tokens: T.
        mask: (T,) True for real tokens; None if all are.
        rows: whether the method looks at single sequences.
        name: what errors call the layer.

    Raises:
        ValueError: boundaries that do not fit.
    """
    if bounds.dim() != 1 or len(bounds) < 2 or bounds.is_floating_point():
        raise ValueError(
            f"{name}: cu_seqlens of shape {tuple(bounds.shape)} and {bounds.dtype}: give "
            "whole numbers (N + 1,), such as [0, 5, 12] for sequences of 5 and 7 tokens."
        )
    inside = torch.arange(tokens, device=bounds.device) < bounds[-1]
    mask = inside if mask is None else mask & inside.to(mask.device)
    if not rows:
        return Lay(mask)
    lengths = bounds.diff()
    if bounds[0] != 0 or (lengths < 0).any() or bounds[-1] > tokens:
        raise ValueError(
            f"{name}: cu_seqlens from {int(bounds[0])} to {int(bounds[-1])} for {tokens} "
            "tokens: they must begin with 0, never fall, and end at most at the last token."
        )
    place = torch.arange(max(int(lengths.max()), 1), device=bounds.device)
    valid = place < lengths.unsqueeze(-1)
    places = torch.where(valid, bounds[:-1].unsqueeze(-1) + place, 0)
    return Lay(mask, len(lengths), places, valid)
