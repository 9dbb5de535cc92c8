"""A model's layers in about ten numbers, for logs and progress bars."""

from collections.abc import Sequence

import torch

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
    rows = []
    for sums in layers:
        if sums is None:
            continue
        hard, soft = sums.hard_load, sums.soft_load
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
            measured["aim_gap"] = soft_hard_gap(rho, hard)
        measured["tokens"] = sums.tokens
        names = list(measured)
        rows.append(torch.stack(list(measured.values())))
    if not rows:
        return {}
    # One table (layers, metrics): one wait for the device for any number of layers.
    table = torch.stack([row.to(rows[0].device) for row in rows]).cpu()
    table = table[table[:, -1] > 0]
    if not len(table):
        return {}
    found = dict(zip(names, table.mean(dim=0).tolist(), strict=True))
    found["maxvio_worst"] = table[:, 0].max().item()
    return found
