"""φ of an estimate against φ of the population, without training: the bias that Jensen promises.

From the mean scores (N, E) of N sequences, of known domains, estimates l̂ of the population's mean
are drawn: the mean of n sequences, picked from all text or from one domain, or a moving average
over such batches. Reported is E[φ(l̂)] − φ(E[l]), which is what a method that minimises φ(l̂) pushes
against although the population is as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moebalance.potentials import NegativeEntropy

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
RATES = (0.03, 0.1, 0.3)
_DRAWS = 2000


def simulated_scores(
    *, num_experts: int = 8, favour: float = 0.65, per_domain: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of E equally frequent domains, each with an expert of its own: E[l] is uniform.

    A sequence of domain d has Dirichlet scores around a mean that puts `favour` on expert d.

    Returns:
        Scores (N, E) and domains (N,), N = E · per_domain.
    """
    random = np.random.default_rng(seed)
    rest = (1 - favour) / (num_experts - 1)
    means = np.full((num_experts, num_experts), rest)
    np.fill_diagonal(means, favour)
    scores = [random.dirichlet(40 * mean, per_domain) for mean in means]
    return np.concatenate(scores), np.arange(num_experts).repeat(per_domain)


def plug_in_bias(
    scores: np.ndarray, domains: np.ndarray, *, sizes: Sequence[int] = SIZES, seed: int = 0
) -> list[dict[str, Any]]:
    """Measure E[φ(l̂)] − φ(E[l]) for negative entropy, in nats, domains weighing alike.

    Args:
        scores: (N, E), rows summing to 1.
        domains: (N,) labels.
        sizes: n, sequences in a batch.
        seed: of the draws.

    Returns:
        A row for each batch size and sampling ("mixed" or "one-domain"), of the batch alone and of
        its moving average at every rate: `sampling`, `size`, `rate` (None: no memory), `excess`.
    """
    random = np.random.default_rng(seed)
    labels = np.unique(domains)
    members = {label: np.flatnonzero(domains == label) for label in labels}
    population = np.mean([scores[members[label]].mean(axis=0) for label in labels], axis=0)
    rows = []
    for sampling in ("mixed", "one-domain"):
        for size in sizes:
            batches = np.stack(
                [_batch(scores, members, labels, size, sampling, random) for _ in range(_DRAWS)]
            )
            for rate in (None, *RATES):
                estimates = batches if rate is None else _averaged(batches, rate)
                excess = float((_phi(estimates) - _phi(population)).mean())
                rows.append({"sampling": sampling, "size": size, "rate": rate, "excess": excess})
    return rows


def _batch(
    scores: np.ndarray,
    members: dict[Any, np.ndarray],
    labels: np.ndarray,
    size: int,
    sampling: str,
    random: np.random.Generator,
) -> np.ndarray:
    count = 1 if sampling == "one-domain" else size
    drawn = random.choice(labels, count).repeat(size // count)
    rows = [random.choice(members[label]) for label in drawn]
    mean: np.ndarray = scores[rows].mean(axis=0)
    return mean


def _averaged(batches: np.ndarray, rate: float) -> np.ndarray:
    """The moving average after each batch, once its start is forgotten."""
    average, found = batches.mean(axis=0), []
    for batch in batches:
        average = average + rate * (batch - average)
        found.append(average)
    return np.stack(found[round(5 / rate) :])


def _phi(loads: np.ndarray) -> np.ndarray:
    values: np.ndarray = NegativeEntropy().value(torch.from_numpy(loads)).numpy()
    return values
