"""Metrics: how even an expert load is, how far soft and hard load differ, who serves which domain.

Pure functions of tensors with the expert axis last and any leading axes (layers, steps). A load is
a count of assignments or a share of them: every function divides by the sum itself,

    f_e = load_e / Σ_j load_j,    uniform: f_e = 1/E.

Results are float32, or float64 if the input is; a load that sums to 0 gives nan (checking it would
stall a GPU). Hard load counts top-k assignments; soft load is the router's mean distribution.
A batch of N tokens is never perfectly even: compare `max_violation` with `sampling_floor`.
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

    0 is even; 1 means that the busiest expert receives twice its share, and with one expert per
    device the step waits for it. Source: Wang et al., arXiv 2408.15664.

    Args:
        load: (..., E) counts or shares.
        proportions: (E,) positive, the proportions that count as even; None for equal ones.

    >>> max_violation(torch.tensor([10, 10, 40, 20]))
    tensor(1.)
    """
    share = _share(load)
    if proportions is not None:
        return (share / _share(proportions)).amax(-1) - 1
    return share.amax(-1) * share.shape[-1] - 1


def min_violation(load: Real[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """MinVio, the shortfall of the idlest expert: 1 − min_e f_e · E, in [0, 1].

    0 is even; 1 means that some expert received nothing and learns nothing.

    Args:
        load: (..., E) counts or shares.

    >>> min_violation(torch.tensor([10, 10, 40, 20]))
    tensor(0.5000)
    """
    share = _share(load)
    return 1 - share.amin(-1) * share.shape[-1]


def coefficient_of_variation(load: Real[Tensor, "*batch E"]) -> Float[Tensor, "*batch"]:
    """Standard deviation over mean, √(E Σ f_e² − 1), in [0, √(E − 1)].

    0 is even; √(E/G − 1) is what G equally loaded experts and E − G empty ones give. Its square is
    the importance loss of Shazeer et al., arXiv 1701.06538. The deviation divides by E, not E − 1.

    Args:
        load: (..., E) counts or shares.

    >>> coefficient_of_variation(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    tensor(1.)
    """
    share = _share(load)
    return share.std(-1, correction=0) * share.shape[-1]


def gini(
    load: Real[Tensor, "*batch E"], proportions: Real[Tensor, " E"] | None = None
) -> Float[Tensor, "*batch"]:
    """Gini coefficient Σ_ij |f_i − f_j| / (2E), in [0, 1 − 1/E].

    0 is even; the largest value is one expert serving all. Unlike `max_violation` it sees the
    whole distribution: above about 0.1 many experts are off their share. With shares ρ it is
    ½ Σ_ij ρ_i ρ_j |f_i/ρ_i − f_j/ρ_j|.

    Args:
        load: (..., E) counts or shares.
        proportions: (E,) positive, the proportions that count as even; None for equal ones.

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

    1 is even, 0 one expert serving all. E to the power of it is the number of experts in effective
    use: 0.9 of 64 experts is 42. It hardly moves near 1, where `max_violation` is the sharper eye.

    Args:
        load: (..., E) counts or shares.

    >>> normalized_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0]))
    tensor(0.5000)
    """
    share = _share(load)
    entropy: Tensor = torch.special.entr(share).sum(-1)
    # Rounding lifts the entropy of an even load above log E by an ulp or two.
    return (entropy / math.log(share.shape[-1])).clamp(max=1)


def dead_fraction(
    load: Real[Tensor, "*batch E"], threshold: float = 0.01
) -> Float[Tensor, "*batch"]:
    """Share of experts with f_e < threshold/E, in [0, 1 − 1/E] for a threshold up to 1.

    0 is good; anything else is capacity paid for and unused. Say over which window the load was
    counted: in a small batch a healthy expert may be empty by chance.

    Args:
        load: (..., E) counts or shares.
        threshold: what counts as dead, as a multiple of the uniform share.

    Raises:
        ValueError: if the threshold is not positive: then no expert could be dead.

    >>> dead_fraction(torch.tensor([50, 50, 0, 100]))
    tensor(0.2500)
    """
    if not threshold > 0:
        raise ValueError(
            f"dead_fraction(threshold={threshold}): no load lies below it; give a positive "
            "multiple of the uniform share, 0.01 for experts below a hundredth of it."
        )
    share = _share(load)
    dead = (share * share.shape[-1] < threshold).to(share.dtype).mean(-1)
    return dead.masked_fill(share.isnan().any(-1), math.nan)


def served_fraction(
    load: Real[Tensor, "*batch E"], capacity: float = 1.0
) -> Float[Tensor, "*batch"]:
    """Σ_e min(f_e, c/E), in [1/E, 1]: what experts with room for c times their share would serve.

    1 minus it is dropped at capacity factor c. At 1 that is the total variation distance from the
    uniform load, and 0 for an even one alone.

    Args:
        load: (..., E) counts or shares, of all choices: those that are dropped included.
        capacity: c > 0, the capacity factor.

    >>> served_fraction(torch.tensor([3, 1, 0, 0]))
    tensor(0.5000)
    """
    share = _share(load)
    return share.clamp(max=capacity / share.shape[-1]).sum(-1)


def soft_hard_gap(
    soft: Real[Tensor, "*batch E"], hard: Real[Tensor, "*batch E"]
) -> Float[Tensor, "*batch"]:
    """Total variation distance ½ Σ_e |soft_e − hard_e| of the two loads' shares, in [0, 1].

    The share of assignments that would have to move for the top-k counts to match the router's
    mean distribution. Methods that balance the soft load leave this much of the hard load to
    chance: where it exceeds the imbalance of the soft load, balance the hard load as well.

    Args:
        soft: (..., E) mean router distribution, or its sum over tokens.
        hard: (..., E) assignments, counts or shares.

    >>> soft_hard_gap(torch.tensor([0.5, 0.5]), torch.tensor([75, 25]))
    tensor(0.2500)
    """
    return (_share(soft) - _share(hard)).abs().sum(-1) / 2


def sampling_floor(tokens: int, num_experts: int, top_k: int) -> float:
    """The `max_violation` that chance alone leaves: √(2 ln E · E/(N K)), for N K well above E ln E.

    Were every assignment drawn evenly and independently, each count would deviate from its mean
    N K/E by its square root, and the largest of E such deviations is near √(2 ln E) of them. A
    round figure from above: the true mean is lower by about a fifth at E = 64. Only a violation
    well beyond it says something about the router.

    Args:
        tokens: N, the tokens that the load was counted over.
        num_experts: E.
        top_k: K, experts per token.

    Raises:
        ValueError: if tokens is below 1 or top_k is not between 1 and num_experts.

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
    """max_e − min_e of a price, in the price's own unit; adding a constant to it changes nothing.

    0 without pressure. Still growing late in training: the method pushes ever harder without
    getting balance, so look for an expert that cannot respond.

    Args:
        price: (..., E) price of each expert.

    >>> price_spread(torch.tensor([-0.5, 0.0, 1.0]))
    tensor(1.5000)
    """
    return price.amax(-1) - price.amin(-1)


def _share(load: Tensor, axes: int | tuple[int, ...] = -1) -> Tensor:
    load = load.to(torch.promote_types(load.dtype, torch.float32))
    return load / load.sum(axes, keepdim=True)
