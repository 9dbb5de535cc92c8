"""Held-out loss, expert loads and specialisation of a model, in one pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moebalance import Balancing, metrics
from moebalance.core.layer import LayerBalance
from moebalance.integrations.huggingface import Site, find_sites
from moebalance.lab.text.batches import TokenDataset

Choices = dict[str, Tensor]
"""Experts (N, K) of every held-out token, by layer, as an evaluation found them."""

_MOST_PAIRS = 16_000  # pairs of experts in one evaluation row: about 100 kB


class _Watch:
    """Counts of one layer: by domain and expert, by pair, scores, and MaxVio of each batch."""

    def __init__(self, layer: LayerBalance, site: Site, num_domains: int) -> None:
        self.layer, self.site = layer, site
        self.domain_counts = torch.zeros(num_domains, layer.num_experts)
        self.scores = torch.zeros(layer.num_experts)
        self.together = torch.zeros(layer.num_experts, layer.num_experts)
        self.violations: list[Tensor] = []
        self.experts: list[Tensor] = []
        self.domains: Tensor | None = None

    @property
    def rows(self) -> Tensor | None:
        """The router's weight (E, D), where it has one."""
        weight = getattr(self.site.router, "weight", None)
        fits = isinstance(weight, Tensor) and weight.shape[:-1] == (self.layer.num_experts,)
        return weight if fits else None

    def see(self, router: nn.Module, args: Any, output: Any) -> None:
        logits, _, experts = self.site.read(output)
        assert self.domains is not None
        per_token = self.domains.repeat_interleave(experts.shape[0] // self.domains.shape[0])
        cells = (per_token.unsqueeze(-1) * self.layer.num_experts + experts).reshape(-1).cpu()
        counts = torch.bincount(cells, minlength=self.domain_counts.numel())
        counts = counts.view_as(self.domain_counts).float()
        self.domain_counts += counts
        self.scores += self.layer.gate.scores(logits).sum(dim=0).cpu()
        served = torch.zeros(experts.shape[0], self.layer.num_experts, device=experts.device)
        served.scatter_(-1, experts.long(), 1.0)
        self.together += (served.mT @ served).cpu()
        self.violations.append(metrics.max_violation(counts.sum(dim=0)))
        self.experts.append(experts.short().cpu())


@torch.no_grad()
def evaluate(
    model: nn.Module,
    balancing: Balancing,
    dataset: TokenDataset,
    *,
    batch_size: int,
    choices: Choices | None = None,
) -> dict[str, Any]:
    """Evaluate a balanced model on held-out sequences.

    Args:
        model: a Transformers language model with `balancing` attached.
        balancing: the handle of the model; names the layers to watch.
        dataset: sequences with their domains.
        batch_size: sequences in a batch; `maxvio_batch` is the mean over these batches.
        choices: experts that the last evaluation on these sequences chose, empty before the first;
            replaced by the choices of this evaluation.

    Returns:
        Means over layers:
        `loss` in nats per token (no mean over layers);
        `maxvio`, `gini`, `entropy`, `dead` of the hard load over the whole set; `maxvio_batch`;
        `soft_maxvio`, `soft_hard_gap`, `router_similarity`;
        with several domains `mi` (nats) and `purity` between domain and expert;
        `churn` since the last evaluation.
        Also `dead_experts` over all layers, the loads, and `coactivation`: how often two experts
        serve one token, in as many layers (`coactivation_layers`) as take little room.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with _watching(model, balancing, len(dataset.domain_names)) as watches:
        for batch in DataLoader(dataset, batch_size=batch_size):
            for watch in watches.values():
                watch.domains = batch["domain"].to(device)
            ids = batch["input_ids"].to(device)
            predicted = ids.shape[0] * (ids.shape[1] - 1)
            total += model(input_ids=ids, labels=ids).loss.item() * predicted
            tokens += predicted
    model.train(was_training)

    by_domain = torch.stack([watch.domain_counts for watch in watches.values()])
    soft = torch.stack([watch.scores for watch in watches.values()])
    hard = by_domain.sum(dim=1)
    dead = metrics.dead_fraction(hard)
    batches = torch.stack([torch.stack(watch.violations) for watch in watches.values()])
    found = {
        "loss": total / tokens,
        "maxvio": _mean(metrics.max_violation(hard)),
        "maxvio_batch": _mean(batches),
        "soft_maxvio": _mean(metrics.max_violation(soft)),
        "soft_hard_gap": _mean(metrics.soft_hard_gap(soft, hard)),
        "gini": _mean(metrics.gini(hard)),
        "entropy": _mean(metrics.normalized_entropy(hard)),
        "dead": _mean(dead),
        "dead_experts": round((dead * hard.shape[-1]).sum().item()),
        "tokens": tokens,
        "load": fractions(hard),
        "soft": fractions(soft),
    }
    if by_domain.shape[-1] > 2 and any(watch.site.top_k > 1 for watch in watches.values()):
        found |= _coactivation([watch.together for watch in watches.values()])
    if len(dataset.domain_names) > 1:  # one domain alone tells nothing of specialisation
        found |= {
            "mi": _mean(metrics.mutual_information(by_domain)),
            "purity": _mean(metrics.purity(by_domain)),
            "domain_load": fractions(by_domain, over=(-2, -1)),
        }
    rows = [watch.rows for watch in watches.values()]
    if all(row is not None for row in rows):
        found["router_similarity"] = _mean(
            torch.stack([metrics.router_similarity(row) for row in rows if row is not None])
        )
    if choices is not None:
        found |= _churn(choices, {name: torch.cat(w.experts) for name, w in watches.items()})
    return found


def pair_lift(together: Tensor) -> Tensor:
    """How often two experts serve one token, as a multiple of what their loads alone give.

    N_ij over c_i c_j · Σ_{i≠j} N_ij / Σ_{i≠j} c_i c_j, with c the tokens of each expert.

    Args:
        together: (E, E) tokens that both experts serve; on the diagonal the tokens of one expert.

    Returns:
        (E, E) multiples, 1 where two experts ignore each other; 0 on the diagonal, and for an
        expert that served nobody.
    """
    counts = together.diagonal()
    chance = torch.outer(counts, counts).fill_diagonal_(0)
    pairs = together.clone().fill_diagonal_(0)
    return (pairs / (chance * pairs.sum() / chance.sum())).nan_to_num(nan=0.0)


def fractions(load: Tensor, over: tuple[int, ...] = (-1,)) -> list[Any]:
    """A load as nested lists of fractions, rounded to six decimals."""
    parts = (load / load.sum(dim=over, keepdim=True)).tolist()
    return [_rounded(part) for part in parts]


def _churn(before: Choices, now: Choices) -> dict[str, float]:
    """How many tokens changed their experts since the last time, which is then forgotten."""
    changed = [metrics.churn(before[name], now[name]) for name in now if name in before]
    before.clear()
    before.update(now)
    return {"churn": _mean(torch.stack(changed))} if changed else {}


def _coactivation(together: list[Tensor]) -> dict[str, Any]:
    """For some layers, always the first and the last, the lift of the pairs above the diagonal."""
    num_experts = len(together[0])
    above = torch.triu_indices(num_experts, num_experts, offset=1)
    most = max(2, _MOST_PAIRS // above.shape[1])
    count = min(most, len(together))
    layers = sorted({round(i * (len(together) - 1) / max(1, count - 1)) for i in range(count)})
    lifts = [pair_lift(together[i])[above[0], above[1]].tolist() for i in layers]
    short = [[float(f"{x:.3g}") for x in lift] for lift in lifts]
    return {"coactivation_layers": layers, "coactivation": short}


@contextmanager
def _watching(
    model: nn.Module, balancing: Balancing, num_domains: int
) -> Iterator[dict[str, _Watch]]:
    sites = {site.name: site for site in find_sites(model)}
    watches = {
        name: _Watch(layer, sites[name], num_domains) for name, layer in balancing.layers.items()
    }
    handles = [
        model.get_submodule(name).register_forward_hook(watch.see)
        for name, watch in watches.items()
    ]
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()


def _mean(values: Tensor) -> float:
    return values.float().mean().item()


def _rounded(values: Any) -> Any:
    return [_rounded(v) for v in values] if isinstance(values, list) else round(values, 6)
