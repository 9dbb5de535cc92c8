"""SteadyPrice: its formula, and where it comes to rest."""

import numpy as np
import pytest
import torch

from cases import to_double
from moebalance import SMEBU, LossFree, SteadyPrice, metrics
from moebalance.routing import Sums

EXPERTS, TOP_K = 32, 4


def sums_of(counts: torch.Tensor) -> Sums:
    return Sums(counts, counts, counts.sum())


def course(loads: np.ndarray, speed: float, rate: float, clamp: float) -> np.ndarray:
    """The price after these loads (steps, E), as the module's docstring says it."""
    price, mean, weight = np.zeros(loads.shape[1]), np.zeros(loads.shape[1]), 0.0
    for counts in loads:
        mean = (1 - rate) * mean + rate * counts / counts.sum()
        weight = (1 - rate) * weight + rate
        move = np.tanh(clamp * (mean / weight * len(mean) - 1))
        price = price + speed * (move - move.mean())
    return price


@pytest.mark.parametrize("scale", ["affinity", "nats"])
def test_it_follows_its_formula_over_thirty_steps(scale):
    loads = np.random.default_rng(0).integers(1, 90, (30, 8)).astype(np.float64)
    method = SteadyPrice(speed=0.02, rate=0.3, clamp=1.5, scale=scale)
    state = to_double(method.init(8))
    for counts in torch.from_numpy(loads):
        state = method.update(state, sums_of(counts))
    expected = course(loads, 0.02, 0.3, 1.5)
    np.testing.assert_allclose(state.price.numpy(), expected, atol=1e-12)


def logits_of(domain: int, tokens: int, *, seed: int) -> torch.Tensor:
    """Logits of text of one of four domains, whose experts differ."""
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(100 + domain))
    noise = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(1000 + seed))
    return bias + noise


def counts_of(price: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    chosen = (logits - price).topk(TOP_K).indices
    return torch.bincount(chosen.flatten(), minlength=EXPERTS).float()


def rest(method: LossFree | SMEBU | SteadyPrice) -> float:
    """MaxVio over all domains after steps of one domain each; mean over the last steps."""
    state, found = method.init(EXPERTS), []
    whole = torch.cat([logits_of(domain, 1024, seed=domain) for domain in range(4)])
    turns = torch.randint(4, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    for step, domain in enumerate(turns):
        counts = counts_of(state.price, logits_of(domain, 256, seed=step))
        state = method.update(state, sums_of(counts))
        if step >= 400 and step % 10 == 0:
            found.append(metrics.max_violation(counts_of(state.price, whole)).item())
    return sum(found) / len(found)


def test_where_each_step_has_one_domain_it_evens_out_all_of_them_and_clamped_errors_do_not():
    assert rest(SteadyPrice()) < 0.3
    for method in (LossFree(scale="nats"), SMEBU(scale="nats")):
        assert rest(method) > 0.8


def test_a_step_without_a_token_changes_nothing():
    method = SteadyPrice()
    state = method.update(method.init(4), sums_of(torch.tensor([5.0, 1.0, 1.0, 1.0])))
    after = method.update(state, sums_of(torch.zeros(4)))
    for old, new in ((state.price, after.price), (state.load.mean, after.load.mean)):
        assert torch.equal(old, new)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.5}, {"clamp": 0.0}, {"speed": -1.0}])
def test_numbers_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SteadyPrice(**wrong)
