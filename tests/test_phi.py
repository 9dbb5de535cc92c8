"""φ-balancing against a transcription of the paper's Algorithm 1, its identities and its claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cases import POTENTIALS, one_batch, random_routing, skewed_state, to_double
from moebalance import EmaSwitchLoss, Euclidean, NegativeEntropy, PhiBalancing, SwitchLoss
from moebalance.methods import charge, observe
from moebalance.routing import Batch, route
from simulation import Domains, averages, excess

# ∇φ of the paper's Table 1, with the parameters of `cases.POTENTIALS`.
PRICES = {
    "euclidean": lambda m: m,
    "lp": lambda m: np.sign(m) * np.abs(m) ** 1.5,
    "soft-l1": lambda m: m / (np.abs(m) + 0.3),
    "negative-entropy": lambda m: np.log(m) + 1,
    "tsallis": lambda m: (1.3 * m**0.3 - 1) / 0.3,
    "renyi": lambda m: 0.7 * m ** (-0.3) / (-0.3 * np.sum(m**0.7)),
    "pseudo-huber": lambda m: m / np.sqrt(m**2 + 0.4**2),
    "log-cosh": lambda m: np.tanh(3 * m),
    "softplus": lambda m: 1 / (1 + np.exp(-m)),
}
STEPS, TOKENS, EXPERTS = 30, 16, 8
every_potential = pytest.mark.parametrize("name", POTENTIALS)


def drifting_logits(seed: int = 0) -> np.ndarray:
    """Logits (S, T, E) of a router whose preference wanders from step to step."""
    random = np.random.default_rng(seed)
    drift = np.cumsum(random.normal(size=(STEPS, 1, EXPERTS)) * 0.3, axis=0)
    return drift + random.normal(size=(STEPS, TOKENS, EXPERTS))


def softmax(z: np.ndarray) -> np.ndarray:
    shifted = np.exp(z - z.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def routings(steps: np.ndarray):
    for logits in torch.from_numpy(steps):
        yield random_routing(TOKENS, EXPERTS)._replace(
            logits=logits, scores=logits.softmax(-1), experts=logits.topk(2).indices
        )


def algorithm_1(steps, price, *, strength, rate, corrected, share=1.0, load="soft"):
    """∂/∂z of α·E·⟨q, p̄⟩ at each step, with m as Algorithm 1 of arXiv 2605.15403 keeps it."""
    m, weight = np.zeros(EXPERTS), 0.0
    for z in steps:
        p = softmax(z)
        seen_load = p.mean(0)
        if load == "hard":
            chosen = np.argsort(-z, axis=-1)[:, :2]
            seen_load = np.bincount(chosen.ravel(), minlength=EXPERTS) / chosen.size
        seen = m + rate * share * (seen_load - m)
        seen_weight = weight + rate * share * (1 - weight)
        q = price(seen / seen_weight if corrected else seen)
        yield strength * EXPERTS / TOKENS * p * (q - (p * q).sum(-1, keepdims=True))
        m = m + rate * (seen_load - m)
        weight = weight + rate * (1 - weight)


def run(method, steps, *, share=1.0):
    state = to_double(method.init(EXPERTS))
    for routing in routings(steps):
        batch = one_batch(method, state, routing, share)
        yield method.penalty_gradient(state, batch).numpy()
        state = method.update(state, batch.sums)


def assert_same_gradients(found, expected, tolerance=1e-12):
    found, expected = np.stack(list(found)), np.stack(list(expected))
    assert np.abs(expected).max() > 1e-5
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# --- Algorithm 1 ------------------------------------------------------------------------------


@every_potential
def test_gradients_follow_algorithm_1_over_thirty_steps(name):
    steps = drifting_logits()
    method = PhiBalancing(POTENTIALS[name], strength=0.02, rate=0.3, unit="paper")
    expected = algorithm_1(steps, PRICES[name], strength=0.02, rate=0.3, corrected=True)
    assert_same_gradients(run(method, steps), expected)


def test_negative_entropy_needs_no_bias_correction():
    """m₀ = 0 without correction, as printed: log m then differs by a constant only."""
    steps = drifting_logits()
    expected = algorithm_1(
        steps, PRICES["negative-entropy"], strength=0.02, rate=0.3, corrected=False
    )
    assert_same_gradients(run(PhiBalancing(strength=0.02, rate=0.3, unit="paper"), steps), expected)


def test_bias_correction_changes_the_other_potentials_start():
    steps = drifting_logits()
    method = PhiBalancing(Euclidean(), strength=0.02, rate=0.3, unit="paper")
    plain = algorithm_1(steps, PRICES["euclidean"], strength=0.02, rate=0.3, corrected=False)
    found, expected = np.stack(list(run(method, steps))), np.stack(list(plain))
    np.testing.assert_allclose(found[0], expected[0] / 0.3, rtol=1e-10)
    np.testing.assert_allclose(found[-1], expected[-1], rtol=1e-4)


@every_potential
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_a_batch_that_is_a_share_of_its_step_moves_the_price_by_that_share(name, share):
    steps = drifting_logits(1)
    method = PhiBalancing(POTENTIALS[name], strength=0.02, rate=0.5, unit="paper")
    expected = algorithm_1(
        steps, PRICES[name], strength=0.02, rate=0.5, corrected=True, share=share
    )
    assert_same_gradients(run(method, steps, share=share), expected)


@every_potential
def test_hard_statistic_averages_the_realised_load_and_charges_the_scores(name):
    steps = drifting_logits(2)
    # An expert that no token has ever chosen has a price of its own: keep all of them in use.
    steps = steps * 0.2
    method = PhiBalancing(POTENTIALS[name], strength=0.02, rate=0.3, load="hard", unit="paper")
    expected = algorithm_1(
        steps, PRICES[name], strength=0.02, rate=0.3, corrected=True, load="hard"
    )
    found, expected = list(run(method, steps)), list(expected)
    assert_same_gradients(found, expected)


def test_without_peeking_the_price_comes_from_finished_steps_alone():
    method = PhiBalancing(strength=0.02, peek=False, unit="paper")
    state = skewed_state(method, EXPERTS)
    a, b = (one_batch(method, state, random_routing(seed=seed)) for seed in (1, 2))
    assert torch.equal(method.loss_price(state, a), method.loss_price(state, b))
    log = state.mean.log()
    expected = 0.02 * (log - (state.mean * log).sum())
    torch.testing.assert_close(method.loss_price(state, a), expected)


def test_the_first_step_without_peeking_charges_nothing():
    method = PhiBalancing(peek=False, unit="paper")
    batch = one_batch(method, method.init(EXPERTS), random_routing())
    assert method.penalty_gradient(method.init(EXPERTS), batch).abs().max() < 1e-8


def test_penalty_is_strength_times_number_of_experts_times_price_times_mean_score():
    method = PhiBalancing(strength=0.02, rate=0.3, unit="paper")
    state = to_double(skewed_state(method, EXPERTS))
    routing = random_routing(dtype=torch.float64)
    batch = one_batch(method, state, routing)
    mean = state.toward(batch.sums.soft_load, 0.3).mean
    price = mean.log() - (mean * mean.log()).sum()
    expected = 0.02 * EXPERTS * (price * routing.scores.mean(0)).sum()
    torch.testing.assert_close(method.penalty(state, batch), expected)
    torch.testing.assert_close(charge(0.02 * price, routing), expected)


def test_no_gradient_flows_through_the_price():
    method = PhiBalancing(strength=0.02, rate=0.3, unit="paper")
    state = to_double(skewed_state(method, EXPERTS))
    logits = random_routing(dtype=torch.float64).logits.requires_grad_()
    routing = random_routing()._replace(logits=logits, scores=logits.softmax(-1))
    # Sums that carry a gradient, as nothing in the library hands over: the price cuts it off.
    sums = observe(method, state, routing)._replace(scores=routing.scores.sum(dim=0))
    batch = Batch(routing, sums, sums)
    assert batch.sums.soft_load.requires_grad
    (found,) = torch.autograd.grad(method.penalty(state, batch), logits)
    constant = method.loss_price(state, batch).detach()
    scores, price = routing.scores.detach(), constant * EXPERTS / routing.tokens
    expected = scores * (price - (scores * price).sum(dim=-1, keepdim=True))
    torch.testing.assert_close(found, expected)


# --- identities -------------------------------------------------------------------------------


@every_potential
def test_without_memory_the_term_descends_the_potential_of_the_batch(name):
    """At rate 1 the price is ∇φ(p̄), so the gradient is that of α·E·φ(p̄), the plug-in objective."""
    method = PhiBalancing(POTENTIALS[name], strength=0.02, rate=1.0, unit="paper")
    state = to_double(skewed_state(method, EXPERTS))
    logits = random_routing(dtype=torch.float64).logits.requires_grad_()
    objective = 0.02 * EXPERTS * POTENTIALS[name].value(logits.softmax(-1).mean(0))
    (expected,) = torch.autograd.grad(objective, logits)
    routing = random_routing(dtype=torch.float64)
    found = method.penalty_gradient(state, one_batch(method, state, routing))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


def test_ema_switch_is_hard_euclidean_phi_balancing():
    steps = drifting_logits(3)
    phi = PhiBalancing(Euclidean(), strength=0.02, rate=0.4, load="hard", unit="paper")
    assert_same_gradients(run(EmaSwitchLoss(strength=0.02, rate=0.4), steps), run(phi, steps))


def test_switch_is_hard_euclidean_phi_balancing_without_memory():
    steps = drifting_logits(4)
    phi = PhiBalancing(Euclidean(), strength=0.02, rate=1.0, load="hard", unit="paper")
    assert_same_gradients(run(SwitchLoss(strength=0.02), steps), run(phi, steps))


@every_potential
def test_unit_slope_scales_the_gradient_by_the_slope(name):
    steps = drifting_logits(5)
    potential = POTENTIALS[name]
    slope = potential.slope(EXPERTS)
    rescaled = PhiBalancing(potential.unit_slope(), strength=0.02 * slope, unit="paper")
    assert_same_gradients(
        run(rescaled, steps), run(PhiBalancing(potential, strength=0.02, unit="paper"), steps)
    )


def test_the_gradient_is_additive_over_micro_batches_at_a_given_price():
    method = PhiBalancing(strength=0.02, peek=False, unit="paper")
    state = to_double(skewed_state(method, EXPERTS))
    whole = random_routing(24, EXPERTS, dtype=torch.float64)
    together = method.penalty_gradient(state, one_batch(method, state, whole))
    apart = []
    for rows in torch.arange(24).split([4, 12, 8]):
        part = route(whole.logits[rows], whole.experts[rows], whole.gate)
        weight = len(rows) / 24
        apart.append(weight * method.penalty_gradient(state, one_batch(method, state, part)))
    torch.testing.assert_close(torch.cat(apart), together)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"strength": -1.0}, ValueError),
        ({"strength": float("nan")}, ValueError),
        ({"rate": 0.0}, ValueError),
        ({"rate": 1.5}, ValueError),
        ({"load": "medium"}, ValueError),
        ({"potential": "entropy"}, TypeError),
    ],
)
def test_impossible_hyper_parameters_are_refused_by_name(bad, error):
    with pytest.raises(error, match=next(iter(bad))):
        PhiBalancing(**bad)


# --- the claim about populations --------------------------------------------------------------


def test_one_domain_batches_look_unbalanced_however_large_they_are():
    """The population is exactly uniform (see `simulation.py`), so the true excess is 0."""
    domains = Domains()
    found = [
        excess(NegativeEntropy(), torch.stack([domains.one_domain(tokens) for _ in range(100)]))
        for tokens in (128, 1024, 8192)
    ]
    expected = (domains.means[0] * np.log(domains.means[0] * domains.num_experts)).sum()
    assert found == pytest.approx([expected] * 3, rel=0.02)


def test_mixed_batches_look_balanced_in_proportion_to_their_size():
    domains = Domains()
    small, middle, large = (
        excess(NegativeEntropy(), torch.stack([domains.mixed(tokens) for _ in range(100)]))
        for tokens in (128, 1024, 8192)
    )
    assert small / middle > 6
    assert middle / large > 6


@pytest.mark.parametrize("rate", [0.3, 0.1, 0.05])
def test_averaging_over_steps_balances_one_domain_batches_as_its_variance_predicts(rate):
    """Of independent draws with variance V an average of rate r has variance V · r/(2 − r).

    The Euclidean excess ½‖m − uniform‖² is half the summed variance, so the prediction is exact
    for it, however far single domains are from uniform. The first 20/r steps, where the
    bias-corrected average still remembers its start, are left out.
    """
    domains = Domains(seed=7)
    loads = torch.stack([domains.one_domain(128) for _ in range(6000)])
    remembered = averages(rate, loads, skip=int(20 / rate))
    ratio = excess(Euclidean(), remembered) / excess(Euclidean(), loads)
    assert ratio == pytest.approx(rate / (2 - rate), rel=0.15)


def test_averaging_brings_the_entropy_of_one_domain_batches_down_thirtyfold():
    domains = Domains(seed=8)
    loads = torch.stack([domains.one_domain(128) for _ in range(3000)])
    remembered = averages(0.05, loads, skip=400)
    assert excess(NegativeEntropy(), loads) / excess(NegativeEntropy(), remembered) > 20
