"""`rate="auto"`: the rate that a Kalman filter would use, found from the loads alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import moebalance as mb
from moebalance.methods.adaptive import FASTEST, SLOWEST, START, Adaptive
from moebalance.methods.ema import Ema
from moebalance.methods.memory import batch_rate
from moebalance.routing import Sums

EXPERTS = 32


def signal_to_noise(gain: float) -> float:
    """Q / R at which this is the steady gain of the Kalman filter."""
    return gain**2 / (1 - gain)


def local_level(
    gain: float, steps: int, *, seed: int, correlation: float = 0.0, noise: float = 0.1
) -> np.ndarray:
    """Loads (T, E) of a walk seen through noise, both around an even share and summing to 1."""
    random = np.random.default_rng(seed)
    walk = random.normal(size=(steps, EXPERTS)).cumsum(axis=0) * math.sqrt(signal_to_noise(gain))
    seen = np.zeros((steps, EXPERTS))
    fresh = random.normal(size=(steps, EXPERTS))
    for t in range(steps):
        before = seen[t - 1] if t else random.normal(size=EXPERTS)
        seen[t] = correlation * before + math.sqrt(1 - correlation**2) * fresh[t]
    x = noise * (walk + seen)
    return (1 + x - x.mean(axis=1, keepdims=True)) / EXPERTS


def kalman_gain(ratio: float) -> float:
    """The steady gain, by the filter's own recursion of variances, R = 1."""
    variance = 1.0
    for _ in range(10_000):
        predicted = variance + ratio
        gain = predicted / (predicted + 1)
        variance = (1 - gain) * predicted
    return gain


def follow(streams: list[np.ndarray]) -> tuple[torch.Tensor, Adaptive]:
    """The means (S, T, E) and the last states, a row each, of streams (T, E) of loads."""
    method = mb.PhiBalancing(load="hard", rate="auto")

    def along(loads: torch.Tensor) -> tuple[torch.Tensor, Adaptive]:
        state, means = method.init(EXPERTS), []
        for load in loads:
            state = method.update(state, Sums(load, load, torch.ones(())))
            means.append(state.mean)
        return torch.stack(means), state

    return torch.vmap(along)(torch.tensor(np.stack(streams), dtype=torch.float32))


def adapted(*streams: np.ndarray) -> list[float]:
    """The rate that each stream of loads (T, E) ends with."""
    _, states = follow(list(streams))
    return torch.vmap(lambda state: state.rate)(states).tolist()


def typical(rates: list[float]) -> float:
    return math.exp(np.mean(np.log(rates)))


@pytest.mark.parametrize("ratio", [0.001, 0.1, 2.0])
def test_the_formula_is_the_steady_gain_of_the_filter(ratio):
    assert 2 / (1 + math.sqrt(1 + 4 / ratio)) == pytest.approx(kalman_gain(ratio), rel=1e-6)


@pytest.mark.parametrize("gain", [0.02, 0.05, 0.1, 0.2])
def test_the_adapted_rate_is_near_the_gain_of_a_filter_that_was_told_the_noise(gain):
    """The geometric mean over seeds within 15 %, each of them within a factor of 1.7."""
    found = adapted(*(local_level(gain, 500, seed=s) for s in range(8)))
    assert typical(found) == pytest.approx(gain, rel=0.15)
    assert all(gain / 1.7 < rate < 1.7 * gain for rate in found)


def test_it_tracks_the_level_nearly_as_well_as_that_filter_and_better_than_wrong_rates():
    gain, steps, begun = 0.05, 700, 250
    random = np.random.default_rng(0)
    walk = random.normal(size=(steps, EXPERTS)).cumsum(axis=0) * math.sqrt(signal_to_noise(gain))
    x = 0.02 * (walk + random.normal(size=walk.shape))
    level = (1 + 0.02 * (walk - walk.mean(axis=1, keepdims=True))) / EXPERTS
    loads = (1 + x - x.mean(axis=1, keepdims=True)) / EXPERTS

    def miss(means: np.ndarray) -> float:
        return float(((means - level)[begun:] ** 2).mean())

    def at(rate: float) -> np.ndarray:
        means = [loads[0]]
        for load in loads[1:]:
            means.append((1 - rate) * means[-1] + rate * load)
        return np.array(means)

    means, _ = follow([loads])
    own = miss(means[0].numpy())
    assert own < 1.05 * miss(at(gain))
    assert miss(at(0.01)) > 1.3 * own
    assert miss(at(0.3)) > 1.3 * own


def test_noise_that_lasts_over_steps_asks_for_a_longer_memory_than_independent_noise():
    """Steps of one domain in a row: noise of equal variance, correlated from step to step."""
    lasting, independent = (
        typical(adapted(*(local_level(0.1, 700, seed=s, correlation=c) for s in range(8))))
        for c in (0.5, 0.0)
    )
    assert lasting < 0.85 * independent


def test_batches_of_one_domain_ask_for_a_longer_memory_than_mixed_ones():
    """The same router and tokens, drawn from one of four domains a step, or from all of them."""
    random = np.random.default_rng(0)
    domains = random.dirichlet(np.full(EXPERTS, 2.0), size=4)
    steps, tokens = 600, 512
    walk = 0.01 * random.normal(size=(steps, EXPERTS)).cumsum(axis=0)

    def stream(*, one_domain: bool) -> np.ndarray:
        loads = []
        for t in range(steps):
            mix = np.eye(4)[random.integers(4)] if one_domain else np.full(4, 0.25)
            share = (mix @ domains) * np.exp(walk[t])
            loads.append(random.multinomial(tokens, share / share.sum()) / tokens)
        return np.array(loads)

    single, mixed = adapted(stream(one_domain=True), stream(one_domain=False))
    assert single < 0.5 * mixed


@pytest.mark.parametrize("width", [2, 4])
def test_the_memory_in_tokens_is_the_same_at_another_batch_size(width):
    """Larger steps have less noise and more walk, so that n / η stays."""
    streams = [local_level(0.03, 1200, seed=s) for s in range(4)]
    merged = [stream.reshape(-1, width, EXPERTS).mean(axis=1) for stream in streams]
    small, large = typical(adapted(*streams)), typical(adapted(*merged))
    assert large / width == pytest.approx(small, rel=0.25)


def test_it_begins_with_the_usual_rate_and_stays_within_bounds():
    assert Adaptive.empty(4).rate.item() == pytest.approx(START)
    still = np.full((600, EXPERTS), 1 / EXPERTS)
    noise = local_level(1e-4, 600, seed=0)
    jumps = local_level(0.99, 600, seed=0, noise=1e-3)
    found = adapted(still, noise, jumps)
    assert all(SLOWEST * 0.999 <= rate <= FASTEST * 1.001 for rate in found)
    assert found[1] < 0.02
    assert found[2] > 0.25


def test_a_batch_peeks_with_its_share_of_the_adapted_rate():
    _, states = follow([local_level(0.1, 50, seed=0)] * 2)
    state = Adaptive(*(Ema(*(tensor[0] for tensor in ema)) for ema in states))
    method = mb.PhiBalancing(rate="auto")
    batch = mb.routing.Batch(None, None, None, 0.25)
    assert batch_rate(method, state, batch) == pytest.approx(0.25 * state.rate.item())


def test_a_log_has_the_rate_of_every_step():
    router = mb.BalancedRouter(mb.EmaSwitchLoss(rate="auto"), num_experts=8, top_k=2)
    with mb.attach(router) as balancing:
        router(torch.randn(64, 8, requires_grad=True))[0].sum().backward()
        balancing.step()
        found = balancing.metrics()
    assert (
        found["rate"] == found["rate_least"] == found["rate_most"] == pytest.approx(START, rel=0.1)
    )


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="'auto'"):
        mb.PhiBalancing(rate="fast")
    with pytest.raises(ValueError, match="give one of them"):
        mb.PhiBalancing(rate="auto", memory_tokens=100.0)
