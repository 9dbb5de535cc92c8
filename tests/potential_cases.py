"""The potentials that every law is held against, points to try them at, and the paper's table."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import settings
from hypothesis import strategies as st

from moebalance import Euclidean, NegativeEntropy
from moebalance.potentials import (
    LogCosh,
    LpNorm,
    Potential,
    PseudoHuber,
    Renyi,
    SoftL1,
    Softplus,
    Tsallis,
    UnitSlope,
)

PLAIN: list[Potential] = [
    Euclidean(),
    LpNorm(),
    LpNorm(1.5),
    SoftL1(),
    SoftL1(delta=0.05),
    NegativeEntropy(),
    Tsallis(),
    Tsallis(alpha=2.5),
    Tsallis(alpha=0.6),
    Renyi(),
    Renyi(alpha=0.9),
    PseudoHuber(),
    PseudoHuber(delta=0.05),
    LogCosh(),
    LogCosh(beta=5.0),
    Softplus(),
]
CASES = [*PLAIN, *(potential.unit_slope() for potential in PLAIN)]

potentials = pytest.mark.parametrize("potential", CASES, ids=repr)
plain_potentials = pytest.mark.parametrize("potential", PLAIN, ids=repr)
laws = settings(max_examples=12, deadline=None, derandomize=True)
scores = st.floats(-5, 5)
num_experts_drawn = st.sampled_from([2, 3, 8, 64])
logits = num_experts_drawn.flatmap(lambda n: st.lists(scores, min_size=n, max_size=n))
logit_pairs = num_experts_drawn.flatmap(
    lambda n: st.lists(st.tuples(scores, scores), min_size=n, max_size=n)
)


def vector(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def simplex(numbers) -> torch.Tensor:
    return vector(numbers).softmax(-1)


def plain(potential: Potential) -> Potential:
    return potential.potential if isinstance(potential, UnitSlope) else potential


def prices_in_domain(potential: Potential, numbers) -> torch.Tensor:
    """Map any numbers to the interior of the domain of the potential's conjugate."""
    z = vector(numbers)
    match plain(potential):
        case SoftL1() | PseudoHuber() | LogCosh():
            q = z.tanh()
        case Softplus():
            q = z.sigmoid()
        case Renyi():
            q = -z.exp()
        case Tsallis(alpha=a) if a < 1:
            q = 1 / (1 - a) - z.exp()
        case _:
            q = z
    c = plain(potential).slope(len(z)) if isinstance(potential, UnitSlope) else 1.0
    return q / c


def table_value(potential: Potential, m: np.ndarray) -> float:
    """Table 1 of the paper, transcribed to numpy and scipy."""
    match potential:
        case Euclidean():
            return 0.5 * np.linalg.norm(m) ** 2
        case LpNorm(p=p):
            return np.linalg.norm(m, ord=p) ** p / p
        case SoftL1(delta=d):
            return np.sum(np.abs(m) - d * np.log(np.abs(m) / d + 1))
        case NegativeEntropy():
            return -np.sum(scipy.special.entr(m))
        case Tsallis(alpha=a):
            return np.sum(m**a - m) / (a - 1)
        case Renyi(alpha=a):
            return np.log(np.sum(m**a)) / (a - 1)
        case PseudoHuber(delta=d):
            return np.sum(scipy.special.pseudo_huber(d, m)) / d
        case LogCosh(beta=b):
            return np.sum(np.log(np.cosh(b * m))) / b
        case Softplus():
            return -np.sum(scipy.special.log_expit(-m))
    raise AssertionError(potential)


def table_conjugate(potential: Potential, q: np.ndarray) -> float:
    """The same for φ*, where the table gives a closed form."""
    match potential:
        case Euclidean():
            return 0.5 * np.linalg.norm(q) ** 2
        case LpNorm(p=p):
            dual = p / (p - 1)
            return np.linalg.norm(q, ord=dual) ** dual / dual
        case SoftL1(delta=d):
            return np.sum(-d * (np.abs(q) + np.log(1 - np.abs(q))))
        case NegativeEntropy():
            return np.sum(np.exp(q - 1))
        case PseudoHuber(delta=d):
            return np.sum(d - d * np.sqrt(1 - q**2))
        case LogCosh(beta=b):
            pairs = scipy.special.entr(1 + q) + scipy.special.entr(1 - q)
            return -np.sum(pairs) / (2 * b)
        case Softplus():
            return -np.sum(scipy.special.entr(q) + scipy.special.entr(1 - q))
    raise AssertionError(potential)
