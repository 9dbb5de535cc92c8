"""φ-balancing's claim about populations, simulated without a network.

A router serves E domains. A token of domain d has the routing distribution p ~ Dirichlet(c · π_d),
whose mean π_d puts `favour` on expert d and shares the rest evenly. Domains are equally frequent,
so the *population* distribution E[p] is exactly uniform: balanced, with every domain specialised.

What is measured is the excess φ(p̂) − φ(E[p]) of an estimate p̂ of E[p].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moebalance import PhiBalancing
from moebalance.potentials import Potential
from moebalance.routing import Sums


@dataclass
class Domains:
    """Tokens of E domains, each with its own favourite expert."""

    num_experts: int = 8
    favour: float = 0.65
    concentration: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        rest = (1 - self.favour) / (self.num_experts - 1)
        self.means = np.full((self.num_experts, self.num_experts), rest)
        np.fill_diagonal(self.means, self.favour)

    def one_domain(self, tokens: int) -> Tensor:
        """p̄ (E,) of a batch whose tokens all come from one random domain."""
        domain = self.random.integers(self.num_experts)
        return self._mean(self.random.dirichlet(self._concentration(domain), tokens))

    def mixed(self, tokens: int) -> Tensor:
        """p̄ (E,) of a batch whose tokens each come from a random domain."""
        sizes = self.random.multinomial(tokens, np.full(self.num_experts, 1 / self.num_experts))
        drawn = [
            self.random.dirichlet(self._concentration(domain), size)
            for domain, size in enumerate(sizes)
        ]
        return self._mean(np.concatenate(drawn))

    def _concentration(self, domain: int) -> np.ndarray:
        return self.concentration * self.means[domain]

    @staticmethod
    def _mean(scores: np.ndarray) -> Tensor:
        return torch.from_numpy(scores.mean(axis=0))


def excess(potential: Potential, loads: Tensor) -> float:
    """Mean over rows of φ(m) − φ(uniform)."""
    uniform = torch.full_like(loads[0], 1 / loads.shape[-1])
    return (potential.value(loads) - potential.value(uniform)).mean().item()


def averages(rate: float, loads: Tensor, *, skip: int) -> Tensor:
    """What φ-balancing remembers after each step (S, E) of `loads`; the first `skip` left out."""
    method = PhiBalancing(rate=rate)
    state = method.init(loads.shape[-1])
    remembered = []
    for load in loads.float():
        state = method.update(state, Sums(load, load, torch.ones(())))
        remembered.append(state.mean)
    return torch.stack(remembered[skip:]).double()
