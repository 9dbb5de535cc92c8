"""A model's layers in about ten numbers, for logs and progress bars."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moebalance.metrics import (
    coefficient_of_variation,
    dead_fraction,
    gini,
    max_violation,
    min_violation,
    normalized_entropy,
    soft_hard_gap,
)
from moebalance.proportions import Proportions, fractions
from moebalance.routing import Sums


@torch.no_grad()
def summary(layers: Sequence[Sums | None], aim: Proportions | None = None) -> dict[str, float]:
    """Means over layers, and the worst MaxVio.

    Layers without tokens, or without sums, are left out; the result is empty if none is left.

    Args:
        layers: the sums of each layer.
        aim: the proportions that the method aims at; None for equal ones.

    Returns:
        `maxvio`, `maxvio_worst`, `minvio`, `cv`, `gini`, `entropy` and `dead` of the hard load;
        `soft_maxvio` and `soft_hard_gap`; `tokens` a layer. With an aim also `aim_maxvio`, MaxVio
        relative to it, and `aim_gap`, the hard load's total variation distance from it.
    """
    alike: dict[tuple[torch.device, int], list[Sums]] = {}
    for sums in layers:
        if sums is not None:
            alike.setdefault((sums.counts.device, len(sums.counts)), []).append(sums)
    # All layers of a size at once, and one wait for the device: a layer alone is 25 small kernels.
    tables = [_measured(group, aim) for group in alike.values()]
    if not tables:
        return {}
    names = list(tables[0])
    rows = [torch.stack(list(table.values())) for table in tables]
    table = torch.cat([row.to(rows[0].device) for row in rows], dim=1).cpu()
    table = table[:, table[names.index("tokens")] > 0]
    if not table.numel():
        return {}
    found = dict(zip(names, table.mean(dim=1).tolist(), strict=True))
    found["maxvio_worst"] = table[names.index("maxvio")].max().item()
    return found


def _measured(layers: Sequence[Sums], aim: Proportions | None) -> dict[str, Float[Tensor, "L"]]:
    """The metrics of layers of one size on one device."""
    hard = torch.stack([sums.counts for sums in layers])
    soft = torch.stack([sums.scores for sums in layers])
    measured = {
        "maxvio": max_violation(hard),
        "minvio": min_violation(hard),
        "cv": coefficient_of_variation(hard),
        "gini": gini(hard),
        "entropy": normalized_entropy(hard),
        "dead": dead_fraction(hard),
        "soft_maxvio": max_violation(soft),
        "soft_hard_gap": soft_hard_gap(soft, hard),
    }
    if aim is not None:
        rho = fractions(aim, hard)
        measured["aim_maxvio"] = max_violation(hard, rho)
        measured["aim_gap"] = soft_hard_gap(rho.expand_as(hard), hard)
    return {**measured, "tokens": torch.stack([sums.tokens for sums in layers])}
