"""Metrics of a load: how even it is, and how far soft and hard load differ.

Pure functions of tensors (..., E), with any leading axes (layers, steps). A load is a count of
assignments or a fraction of them; every function divides by the sum itself:

    f_e = load_e / Σ_j load_j,    uniform: f_e = 1/E.

Hard load counts top-k assignments; soft load is the router's mean score. Results are float32, or
float64 for float64 input. A load that sums to 0 gives nan, because a check would stall a GPU. A
batch of N tokens is never perfectly even: compare `max_violation` with `sampling_floor`.

Shapes: E experts, N tokens, K top-k.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Real
from torch import Tensor


def max_violation(
    load: Real[Tensor, "*batch E"], proportions: Real[Tensor, " E"] | None = None
) -> Float[Tensor, "*batch"]:
    """MaxVio, the excess of the busiest expert: max_e f_e / ρ_e − 1, ρ_e = 1/E if not given.

    0 is even. At 1 the busiest expert gets twice its part; with one expert on each device, the step
    waits for it. Source: Wang et al., arXiv 2408.15664.

    Args:
        load: (..., E) counts or fractions.
        proportions: (E,) positive, the loads that count as even; None for equal ones.

    >>> max_violation(torch.tensor([10, 10, 40, 20]))
    tensor(1.)
    """
    share = _share(load)
    if proportions is not None:
        return (share / _share(proportions)).amax(-1) - 1
    return share.amax(-1) * share.shape[-1] - 1


def min_violation(load: Real[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """MinVio, the shortfall of the least loaded expert: 1 − min_e f_e · E, in [0, 1].

    0 is even. At 1 some expert gets nothing and learns nothing.

    Args:
        load: (..., E) counts or fractions.

    >>> min_violation(torch.tensor([10, 10, 40, 20]))
    tensor(0.5000)
    """
    share = _share(load)
    return 1 - share.amin(-1) * share.shape[-1]


def coefficient_of_variation(load: Real[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """Standard deviation over mean, √(E Σ f_e² − 1), in [0, √(E − 1)].

    0 is even. G equally loaded experts and E − G empty ones give √(E/G − 1). Its square is the
    importance loss of Shazeer et al., arXiv 1701.06538. The deviation divides by E, not E − 1.

    Args:
        load: (..., E) counts or fractions.

    >>> coefficient_of_variation(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    tensor(1.)
    """
    share = _share(load)
    return share.std(-1, correction=0) * share.shape[-1]


def gini(
    load: Real[Tensor, "*batch E"], proportions: Real[Tensor, " E"] | None = None
) -> Float[Tensor, "*batch"]:
    """Gini coefficient Σ_ij |f_i − f_j| / (2E), in [0, 1 − 1/E].

    0 is even; at the maximum one expert serves all. Unlike `max_violation` it sees the whole
    distribution: above about 0.1 many experts are off an even load. With proportions ρ it is
    ½ Σ_ij ρ_i ρ_j |f_i/ρ_i − f_j/ρ_j|.

    Args:
        load: (..., E) counts or fractions.
        proportions: (E,) positive, the loads that count as even; None for equal ones.

    >>> gini(torch.tensor([1, 1, 0, 0]))
    tensor(0.5000)
    """
    if proportions is not None:
        share, weight = _share(load), _share(proportions)
        order = (share / weight).argsort(-1)
        weight = weight.expand_as(share).gather(-1, order)
        return (share.gather(-1, order) * (2 * weight.cumsum(-1) - weight - 1)).sum(-1)
    ordered = _share(load).sort(-1).values
    num_experts = ordered.shape[-1]
    rank = torch.arange(1, num_experts + 1, device=ordered.device, dtype=ordered.dtype)
    return ((2 * rank - num_experts - 1) * ordered).sum(-1) / num_experts


def normalized_entropy(load: Real[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """−Σ f_e log f_e / log E, in [0, 1]; nan for a single expert.

    1 is even; at 0 one expert serves all. E to this power is the effective number of experts: for
    example, 0.9 of 64 experts is 42. It hardly moves near 1, where `max_violation` shows more.

    Args:
        load: (..., E) counts or fractions.

    >>> normalized_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    tensor(0.5000)
    """
    share = _share(load)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    # Rounding may put the entropy of an even load an ulp or two above log E.
    return (entropy / math.log(share.shape[-1])).clamp(max=1)


def dead_fraction(
    load: Real[Tensor, "*batch E"], threshold: float = 0.01
) -> Float[Tensor, "*batch"]:
    """Fraction of experts with f_e < threshold/E, in [0, 1 − 1/E] for a threshold up to 1.

    0 is good; otherwise you pay for capacity that is not used. Say over which window the load was
    counted: in a small batch a healthy expert may be empty by chance.

    Args:
        load: (..., E) counts or fractions.
        threshold: the limit, as a multiple of an even load.

    Raises:
        ValueError: the threshold is not positive, so no expert could be dead.

    >>> dead_fraction(torch.tensor([50, 50, 0, 100]))
    tensor(0.2500)
    """
    if not threshold > 0:
        raise ValueError(
            f"dead_fraction(threshold={threshold}): no load lies below it. Give a positive "
            "multiple of an even load, for example 0.01 for a hundredth of it."
        )
    share = _share(load)
    dead = (share * share.shape[-1] < threshold).to(share.dtype).mean(-1)
    return dead.masked_fill(share.isnan().any(-1), math.nan)


def served_fraction(
    load: Real[Tensor, "*batch E"], capacity: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Σ_e min(f_e, c/E), in [1/E, 1]: the part served if each expert has room for c even loads.

    The rest is dropped at capacity factor c. At c = 1 the rest is the total variation distance from
    the uniform load, which is 0 only for an even load.

    Args:
        load: (..., E) counts or fractions of all choices, dropped ones included.
        capacity: c > 0, the capacity factor.

    >>> served_fraction(torch.tensor([3, 1, 0, 0]))
    tensor(0.5000)
    """
    share = _share(load)
    return share.clamp(max=capacity / share.shape[-1]).sum(-1)


def soft_hard_gap(
    soft: Real[Tensor, "*batch E"], hard: Real[Tensor, "*batch E"]
) -> Float[Tensor, "*batch"]:
    """Total variation distance ½ Σ_e |soft_e − hard_e| of the two loads, in [0, 1].

    This fraction of the assignments would have to move for the top-k counts to match the router's
    mean score. Methods that balance the soft load do not control this part of the hard load. If it
    is larger than the imbalance of the soft load, balance the hard load too.

    Args:
        soft: (..., E) mean score, or its sum over tokens.
        hard: (..., E) assignments, counts or fractions.

    >>> soft_hard_gap(torch.tensor([0.5, 0.5]), torch.tensor([75, 25]))
    tensor(0.2500)
    """
    return (_share(soft) - _share(hard)).abs().sum(-1) / 2


def sampling_floor(tokens: int, num_experts: int, top_k: int) -> float:
    """The `max_violation` that chance alone leaves: √(2 ln E · E/(N K)), for N K well above E ln E.

    If every assignment is drawn evenly and independently, a count deviates from its mean N K/E by
    about √(N K/E). The largest of E such deviations is near √(2 ln E) of them. This is a
    rough value from above: the true mean is about a fifth lower at E = 64. Only a violation well
    above it says something about the router.

    Args:
        tokens: N, the tokens that the load was counted over.
        num_experts: E.
        top_k: K, experts for each token.

    Raises:
        ValueError: tokens below 1, or top_k not between 1 and num_experts.

    >>> round(sampling_floor(tokens=4096, num_experts=64, top_k=8), 3)
    0.127
    """
    if tokens < 1 or not 1 <= top_k <= num_experts:
        raise ValueError(
            f"sampling_floor(tokens={tokens}, num_experts={num_experts}, top_k={top_k}): "
            "give tokens ≥ 1 and 1 ≤ top_k ≤ num_experts."
        )
    return math.sqrt(2 * math.log(num_experts) * num_experts / (tokens * top_k))


def price_spread(price: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """max_e − min_e of a price, in the price's own unit; a constant added to it changes nothing.

    0 means no pressure. If it still grows late in training, the method pushes harder and harder
    without result: look for an expert that cannot respond.

    Args:
        price: (..., E) price of each expert.

    >>> price_spread(torch.tensor([-0.5, 0.0, 1.0]))
    tensor(1.5000)
    """
    return price.amax(-1) - price.amin(-1)


def _share(load: Tensor, axes: int | tuple[int, ...] = -1) -> Tensor:
    load = load.to(torch.promote_types(load.dtype, torch.float32))
    return load / load.sum(axes, keepdim=True)
