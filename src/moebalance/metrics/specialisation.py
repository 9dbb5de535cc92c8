"""Metrics of specialisation: experts and their domains; how choices change and go together.

Shapes: T tokens, E experts, K top-k, D domains (in `router_similarity`: width of the router).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from moebalance.metrics.load import _share


def purity(domain_load: Real[Tensor, "*batch D E"]) -> Float[Tensor, "*batch"]:
    """Load-weighted mean of `expert_purity`: Σ_e max_D N_{D,e} / N, in [1/D, 1].

    The fraction of assignments that come from their expert's main domain. A router that ignores
    domains scores the fraction of the largest domain, not 0: report both.

    Args:
        domain_load: (..., D, E) assignments of each domain's tokens to each expert.

    >>> purity(torch.tensor([[8, 0], [2, 10]]))
    tensor(0.9000)
    """
    return _share(domain_load, (-2, -1)).amax(-2).sum(-1)


def expert_purity(domain_load: Real[Tensor, "*batch D E"]) -> Float[Tensor, "*batch E"]:
    """max_D N_{D,e} / N_e of each expert, in [1/D, 1]; nan for an expert without load.

    At 1 the expert serves one domain only. Source: the specialisation study of arXiv 2605.15403.

    Args:
        domain_load: (..., D, E) assignments of each domain's tokens to each expert.

    Returns:
        (..., E) purities.

    >>> expert_purity(torch.tensor([[8, 0], [2, 10]]))
    tensor([0.8000, 1.0000])
    """
    return _share(domain_load.mT).amax(-1)


def mutual_information(domain_load: Real[Tensor, "*batch D E"]) -> Float[Tensor, "*batch"]:
    """I(domain; expert) = H(D) + H(E) − H(D, E) in nats, in [0, min(log D, log E)].

    At 0 the expert says nothing about the domain. Domains weigh as counted; to weigh them alike,
    normalise the rows first. Chance alone gives about (D − 1)(E − 1)/(2N) for N independent
    assignments.

    Args:
        domain_load: (..., D, E) assignments of each domain's tokens to each expert.

    >>> mutual_information(torch.eye(2))
    tensor(0.6931)
    """
    joint = _share(domain_load, (-2, -1))
    entr = torch.special.entr
    information: Tensor = (
        entr(joint.sum(-1)).sum(-1) + entr(joint.sum(-2)).sum(-1) - entr(joint).sum((-2, -1))
    )
    # Rounding may put the difference just below 0 if domain and expert are independent.
    return information.clamp(min=0)


def churn(
    before: Int[Tensor, "*batch T K"], after: Int[Tensor, "*batch T K"]
) -> Float[Tensor, "*batch"]:
    """Fraction of tokens whose set of experts changed, in any order, in [0, 1].

    Route the same tokens at two checkpoints. High early and then falling is healthy. If it stays
    high late in training, experts keep losing learnt tokens to others.

    Args:
        before: (..., T, K) expert ids of each token.
        after: (..., T, K) expert ids of the same tokens later.

    Raises:
        ValueError: the shapes differ.

    >>> churn(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [2, 4]]))
    tensor(0.5000)
    """
    if before.shape != after.shape:
        raise ValueError(
            f"churn: experts before {tuple(before.shape)} and after {tuple(after.shape)} must "
            "have one shape (..., T, K): route the same tokens with the same top_k."
        )
    changed = (before.sort(-1).values != after.sort(-1).values).any(-1)
    return changed.float().mean(-1)


def coactivation(experts: Int[Tensor, "T K"], num_experts: int) -> Float[Tensor, "E E"]:
    """N_ij / N_i (E, E): how often expert j serves a token that expert i serves; diagonal 1.

    Rows sum to K. A pair near 1 acts as one larger expert; even mixing gives about
    (K − 1)/(E − 1). Source: OLMoE, arXiv 2409.02060.

    Args:
        experts: (T, K) expert ids of each token.
        num_experts: E.

    Returns:
        (E, E) fractions; nan in the row of an expert that served nobody.

    >>> coactivation(torch.tensor([[0, 1], [0, 2]]), num_experts=3)
    tensor([[1.0000, 0.5000, 0.5000],
            [1.0000, 1.0000, 0.0000],
            [1.0000, 0.0000, 1.0000]])
    """
    serves = torch.zeros(experts.shape[0], num_experts, device=experts.device)
    serves.scatter_(-1, experts.long(), 1.0)
    together = serves.mT @ serves
    return together / together.diagonal()[:, None]


def router_similarity(weight: Float[Tensor, "*batch E D"]) -> Float[Tensor, "*batch"]:
    """Mean |cosine| between two experts' rows of the router's weight, in [0, 1].

    At 1 all experts ask for the same tokens. Random rows of width D give about √(2 / (π D)); below
    it, rows avoid one another. SimBal (arXiv 2506.14038) drives this number to 0.

    Args:
        weight: (..., E, D) the router's weight, one row for each expert.

    Returns:
        (...) means over pairs; nan for a single expert.

    >>> router_similarity(torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]]))
    tensor(0.3333)
    """
    rows = torch.nn.functional.normalize(
        weight.to(torch.promote_types(weight.dtype, torch.float32)), dim=-1
    )
    num_experts = rows.shape[-2]
    cosines = (rows @ rows.mT).abs()
    pairs = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs / (num_experts * (num_experts - 1)) if num_experts > 1 else pairs * math.nan
