"""φ of an estimate against φ of the population: the bias that Jensen's inequality promises.

From the mean scores (N, E) of N sequences, whose domains are known, estimates l̂ of the population's
mean are drawn: the mean of n sequences from all text or from one domain, or a moving average over
such batches. E[φ(l̂)] − φ(E[l]) is what a method that minimises φ(l̂) pushes against although the
population stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import moebalance as mb
from moebalance.lab.inputs import load_texts
from moebalance.lab.recipe import FINAL, Recipe
from moebalance.lab.text.batches import ordered_indices

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
RATES = (0.03, 0.1, 0.3)
_DRAWS = 2000
_SEED = 7


def simulated_scores(
    *, num_experts: int = 8, favour: float = 0.65, per_domain: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of E equally frequent domains, each with an expert of its own: E[l] is uniform.

    A sequence of domain d has Dirichlet scores around a mean that puts `favour` on expert d.

    Returns:
        Scores (N, E) and domains (N,), N = E · per_domain.
    """
    random = np.random.default_rng(seed)
    means = np.full((num_experts, num_experts), (1 - favour) / (num_experts - 1))
    np.fill_diagonal(means, favour)
    scores = [random.dirichlet(40 * mean, per_domain) for mean in means]
    return np.concatenate(scores), np.arange(num_experts).repeat(per_domain)


def trained_scores(
    recipe: Recipe, run: Path, *, sequences: int = 2048
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the model that a run saved, on sequences of its training text.

    Args:
        recipe: of the run.
        run: its folder, with the model in `final/`.
        sequences: N, as many of every domain.

    Returns:
        Mean scores (L, N, E) by layer, and domains (N,).
    """
    from transformers import AutoModelForCausalLM

    train = load_texts(recipe, cache_dir=run / "cache").data.train
    order = ordered_indices(train.domains, batch_size=1, num_batches=sequences, seed=_SEED)
    model = AutoModelForCausalLM.from_pretrained(run / FINAL, trust_remote_code=False)
    return sequence_scores(model, train.in_order(order))


@torch.no_grad()
def sequence_scores(
    model: torch.nn.Module, dataset: Dataset[Any], *, batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Mean softmax score of every expert over each sequence, (L, N, E), and the domains (N,)."""
    model.eval()
    scores, domains = [], []
    for batch in DataLoader(dataset, batch_size=batch_size):
        ids = batch["input_ids"]
        layers = model(input_ids=ids, output_router_logits=True).router_logits
        of_tokens = torch.stack([logits.float().softmax(dim=-1) for logits in layers])  # (L, T, E)
        scores.append(of_tokens.view(len(layers), *ids.shape, -1).mean(dim=2))
        domains.append(batch["domain"])
    return torch.cat(scores, dim=1).double().numpy(), torch.cat(domains).numpy()


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
    members = [np.flatnonzero(domains == label) for label in np.unique(domains)]
    population = np.mean([scores[rows].mean(axis=0) for rows in members], axis=0)

    def batch(size: int, sampling: str) -> np.ndarray:
        count = 1 if sampling == "one-domain" else size
        drawn = random.choice(len(members), count).repeat(size // count)
        mean: np.ndarray = scores[[random.choice(members[label]) for label in drawn]].mean(axis=0)
        return mean

    rows = []
    for sampling in ("mixed", "one-domain"):
        for size in sizes:
            batches = np.stack([batch(size, sampling) for _ in range(_DRAWS)])
            for rate in (None, *RATES):
                estimates = batches if rate is None else _averaged(batches, rate)
                excess = float((_phi(estimates) - _phi(population)).mean())
                rows.append({"sampling": sampling, "size": size, "rate": rate, "excess": excess})
    return rows


def _averaged(batches: np.ndarray, rate: float) -> np.ndarray:
    """The moving average after each batch, once its start is forgotten."""
    average, found = batches.mean(axis=0), []
    for batch in batches:
        average = average + rate * (batch - average)
        found.append(average)
    return np.stack(found[round(5 / rate) :])


def _phi(loads: np.ndarray) -> np.ndarray:
    values: np.ndarray = mb.NegativeEntropy().value(torch.from_numpy(loads)).numpy()
    return values
