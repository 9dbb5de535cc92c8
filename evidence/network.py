"""Mean scores of a trained router on every sequence: what `population.plug_in_bias` draws from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from moebalance.attachment import attach
from moebalance.integrations.huggingface import find_sites
from moebalance.lab.inputs import load_texts
from moebalance.lab.recipe import FINAL, Recipe
from moebalance.lab.text.batches import TokenDataset, ordered_indices
from moebalance.methods import NoBalancing

_SEED = 7


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
    data = load_texts(recipe, cache_dir=run / "cache").data
    order = ordered_indices(data.train.domains, batch_size=1, num_batches=sequences, seed=_SEED)
    chosen = data.train.in_order(order)
    model = AutoModelForCausalLM.from_pretrained(run / FINAL)
    return sequence_scores(model, chosen)


@torch.no_grad()
def sequence_scores(
    model: torch.nn.Module, dataset: TokenDataset, *, batch_size: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """Mean score of every expert over each sequence, (L, N, E), and the domains (N,)."""
    model.eval()
    with attach(model, NoBalancing()) as balancing:
        sites = {site.name: site for site in find_sites(model)}
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in balancing.layers}
        size = 0

        def watch(name: str) -> None:
            def see(router: object, args: object, output: object) -> None:
                scores = balancing.layers[name].gate.scores(sites[name].read(output).logits)
                seen[name].append(scores.view(size, -1, scores.shape[-1]).mean(dim=1))

            handles.append(model.get_submodule(name).register_forward_hook(see))

        handles: list[torch.utils.hooks.RemovableHandle] = []
        try:
            for name in balancing.layers:
                watch(name)
            domains = []
            for batch in DataLoader(dataset, batch_size=batch_size):
                size = len(batch["domain"])
                model(input_ids=batch["input_ids"])
                domains.append(batch["domain"])
        finally:
            for handle in handles:
                handle.remove()
    scores = torch.stack([torch.cat(rows) for rows in seen.values()])
    return scores.double().numpy(), torch.cat(domains).numpy()
