"""The rivals that choose experts, each against a numpy transcription of its source."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch

from cases import add, random_logits, random_routing, skewed_state, to_double
from moebalance import SMEBU, LossFree, QuantileBalancing, Sigmoid, Sinkhorn, Softmax, metrics
from moebalance.methods import observe
from moebalance.methods.selection import SelectionPrice
from moebalance.routing import Sums, measure, route

# --- loss-free --------------------------------------------------------------------------------


def counted(*counts: float) -> Sums:
    load = torch.tensor(counts, dtype=torch.float64)
    return Sums(load, load, load.sum())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LossFree(speed=0.1), [0.1, 0.0, -0.1, -0.1]),
        (LossFree(speed=0.1, rule="proportional"), [0.1 * 1.5, 0, -0.1 * 0.5, -0.1]),
        (LossFree(scale="nats"), [0.01 * 1.5, 0, -0.01 * 0.5, -0.01]),
        (LossFree(scale="nats", rule="sign"), [0.025, 0.005, -0.015, -0.015]),
        (LossFree(speed=0.1, recentre=True), [0.125, 0.025, -0.075, -0.075]),
    ],
    ids=repr,
)
def test_loss_free_moves_each_price_by_hand_computation(method, expected):
    """Counts 10, 4, 2, 0 around their mean of 4."""
    state = method.update(to_double(method.init(4)), counted(10, 4, 2, 0))
    torch.testing.assert_close(state.price, torch.tensor(expected, dtype=torch.float64))


def test_loss_free_is_algorithm_1_of_wang():
    """b_i ← b_i + u · sign(mean c − c_i), chosen by s + b, over 20 steps; our price is −b."""
    method, random = LossFree(speed=0.02), np.random.default_rng(0)
    state, b = to_double(method.init(8)), np.zeros(8)
    for _ in range(20):
        z = random.normal(size=(32, 8)) + np.linspace(-1, 1, 8)
        chosen = np.argsort(-(scipy.special.expit(z) + b), axis=-1)[:, :2]
        logits = torch.from_numpy(z)
        ranked = method.preference(state, Sigmoid(), logits, mask=None, training=True)
        experts = ranked.topk(2).indices
        assert (np.sort(experts.numpy()) == np.sort(chosen)).all()
        c = np.bincount(chosen.ravel(), minlength=8)
        b = b + 0.02 * np.sign(c.mean() - c)
        state = method.update(state, measure(route(logits, experts, Sigmoid())))
        np.testing.assert_allclose(state.price.numpy(), -b, atol=1e-12)


def skewed_logits(tokens, num_experts, seed):
    """Fresh tokens of one fixed router under which the busiest expert gets 3.7 times its share."""
    return random_logits(tokens, num_experts, seed=seed) + torch.linspace(-0.6, 0.6, num_experts)


def steer(method, gate, *, steps, tokens=1024, num_experts=16, top_k=2):
    """Mean MaxVio of the first and of the last 20 steps on fresh draws of one skewed router."""
    state, violations = method.init(num_experts), []
    for seed in range(steps):
        logits = skewed_logits(tokens, num_experts, seed)
        ranked = method.preference(state, gate, logits, mask=None, training=True)
        routing = route(logits, ranked.topk(top_k).indices, gate)
        sums = observe(method, state, routing)
        violations.append(metrics.max_violation(sums.counts).item())
        state = method.update(state, sums)
    return violations[0], float(np.mean(violations[-20:]))


@pytest.mark.parametrize(
    "method",
    [
        LossFree(speed=0.01),
        LossFree(speed=0.05, rule="proportional"),
        LossFree(0.01, recentre=True),
    ],
    ids=repr,
)
def test_loss_free_brings_a_skewed_router_from_maxvio_2_7_below_a_quarter(method):
    """The sampling floor of 1024 tokens, 2 of 16 experts, is 0.21."""
    before, after = steer(method, Sigmoid(), steps=120)
    assert before > 2.5
    assert after < 0.25


def test_recentring_keeps_the_mean_price_at_zero_and_the_choice_as_it_was():
    plain, recentred = LossFree(speed=0.02), LossFree(speed=0.02, recentre=True)
    a, b = to_double(skewed_state(plain, 8)), to_double(skewed_state(recentred, 8))
    assert abs(a.price.mean()) > 1e-3
    assert abs(b.price.mean()) < 1e-8
    torch.testing.assert_close(a.price - a.price.mean(), b.price, atol=1e-7, rtol=0)


# --- quantile ---------------------------------------------------------------------------------


def exact_quantile_price(affinities, price, top_k):
    """K/E upper quantiles over tokens of a − α, α_t the (K+1)-th largest of a_t − price."""
    num_experts = affinities.shape[-1]
    ranked = np.sort(affinities - price, axis=-1)
    margin = affinities - ranked[:, -(top_k + 1)][:, None]
    return np.quantile(margin, 1 - top_k / num_experts, axis=0)


def bin_width(value, bins):
    """Width at `value` of a bin of the signed cube on [−2, 2], from its two edges."""
    position = (np.cbrt(value / 2) + 1) / 2
    low = np.floor(position * bins) / bins
    low, high = (2 * (2 * edge - 1) ** 3 for edge in (low - 1 / bins, low + 2 / bins))
    return (high - low) / 3


@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=repr)
@pytest.mark.parametrize("bins", [200, 1000])
def test_quantile_price_is_within_a_bin_of_the_exact_quantile(gate, bins):
    method = QuantileBalancing(bins=bins)
    state = SelectionPrice(torch.linspace(-0.05, 0.05, 8, dtype=torch.float64))
    logits = random_logits(4000, 8, dtype=torch.float64)
    experts = method.preference(state, gate, logits, mask=None, training=True).topk(2).indices
    routing = route(logits, experts, gate)
    found = method.update(state, observe(method, state, routing)).price.numpy()
    exact = exact_quantile_price(gate.affinities(logits).numpy(), state.price.numpy(), 2)
    width = bin_width(exact - state.price.numpy(), bins)  # bins lie around the price in force
    # Centring mixes the errors of all experts, each at most a bin, into every price.
    error = np.abs(found - (exact - exact.mean()))
    assert (error <= width + width.mean()).all()


@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=repr)
def test_one_quantile_update_brings_maxvio_from_2_9_below_0_6(gate):
    before, after = one_update(gate)
    assert before > 2.5
    assert after < 0.6


def one_update(gate):
    method = QuantileBalancing()
    state, violations = method.init(16), []
    for seed in (0, 1):
        logits = skewed_logits(4096, 16, seed)
        ranked = method.preference(state, gate, logits, mask=None, training=True)
        sums = observe(method, state, route(logits, ranked.topk(2).indices, gate))
        violations.append(metrics.max_violation(sums.counts).item())
        state = method.update(state, sums)
    return violations


def test_quantile_settles_at_the_noise_of_two_batches():
    """One batch sets the price, another is routed by it: √2 of the sampling floor of 0.21."""
    _, after = steer(QuantileBalancing(), Softmax(), steps=40)
    assert after < 0.3


def test_quantile_histogram_holds_every_real_token_once_per_expert():
    method = QuantileBalancing(bins=64)
    routing = random_routing(padded=True)
    (histogram,) = observe(method, method.init(8), routing).extra
    assert torch.equal(histogram.sum(-1), routing.mask.sum().float().expand(8))


def test_quantile_histogram_of_two_ranks_adds_to_the_price_of_both_together():
    method = QuantileBalancing()
    state = method.init(8)
    a, b = random_routing(seed=1), random_routing(seed=2)
    apart = add(observe(method, state, a), observe(method, state, b))
    both = route(torch.cat([a.logits, b.logits]), torch.cat([a.experts, b.experts]), a.gate)
    together = observe(method, state, both)
    assert torch.equal(method.update(state, apart).price, method.update(state, together).price)


def test_quantile_takes_a_router_that_uses_all_experts():
    method = QuantileBalancing()
    routing = random_routing(num_experts=4, top_k=4)
    state = method.update(method.init(4), observe(method, method.init(4), routing))
    assert torch.isfinite(state.price).all()


def violation(scores: torch.Tensor, price: torch.Tensor, top_k: int) -> float:
    counts = torch.bincount((scores - price).topk(top_k).indices.flatten(), minlength=len(price))
    return metrics.max_violation(counts).item()


@pytest.mark.parametrize(
    ("experts", "top_k", "spread", "gate", "scale"),
    [
        (64, 4, 3.0, Softmax(), "nats"),
        (128, 8, 2.0, Softmax(), "nats"),
        (128, 8, 1.0, Sigmoid(), "affinity"),
    ],
    ids=str,
)
def test_quantiles_of_a_histogram_end_within_0_02_of_exact_ones(
    experts, top_k, spread, gate, scale
):
    """Fixed scores of 16384 tokens, 7 updates; more experts in `evidence`."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(16384, experts, generator=generator)
    logits = logits + spread * torch.randn(experts, generator=generator)
    method = QuantileBalancing(scale=scale)
    scores = method.priceable(gate, logits)
    state, exact = method.init(experts), torch.zeros(experts)
    for _ in range(7):
        routing = route(logits, (scores - state.price).topk(top_k).indices, gate)
        state = method.update(state, observe(method, state, routing))
        bar = (scores - exact).topk(top_k + 1).values[:, -1:]
        exact = (scores - bar).topk(16384 * top_k // experts, dim=0).values[-1]
        exact = exact - exact.mean()
    found, best = (violation(scores, price, top_k) for price in (state.price, exact))
    assert violation(scores, torch.zeros(experts), top_k) > 2
    assert found <= best + 0.02


def test_quantile_memory_moves_the_price_a_part_of_the_way():
    routing = random_routing(200, 8)
    whole, part = (QuantileBalancing(memory=memory) for memory in (1.0, 0.25))
    state = SelectionPrice(torch.linspace(-0.1, 0.1, 8))
    sums = observe(whole, state, routing)
    moved = whole.update(state, sums).price - state.price
    torch.testing.assert_close(part.update(state, sums).price - state.price, 0.25 * moved)


@pytest.mark.parametrize("build", [LossFree, QuantileBalancing, SMEBU], ids=lambda b: b.__name__)
@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=repr)
def test_a_price_in_nats_is_a_factor_on_the_affinity(build, gate):
    method = build(scale="nats")
    state = method.adopt(method.init(8), torch.linspace(-1, 1, 8))
    logits = random_logits(50, 8)
    ranked = method.preference(state, gate, logits, mask=None, training=True)
    weighed = gate.affinities(logits) * torch.exp(-state.price)
    assert torch.equal(ranked.topk(2).indices, weighed.topk(2).indices)
    assert method.selection_price(state) is None
    assert not method.traits.has_selection_price
    assert method.traits.selects
    assert method.readings(state)["price_nats"] > 0


def test_one_step_in_nats_moves_the_same_part_of_tokens_for_any_number_of_experts():
    """The affinity's step does not: 0.001 is 0.8 % of 1/8 and 38 % of 1/384."""
    shifted = {}
    for experts in (8, 384):
        for scale in ("nats", "affinity"):
            method = LossFree(scale=scale, speed=0.1 if scale == "nats" else 0.002)
            logits = random_logits(4000, experts, seed=3)
            state = method.init(experts)._replace(price=method.speed * (torch.arange(experts) % 2))
            ranked = method.priceable(Softmax(), logits)
            before, after = ranked.argmax(-1), (ranked - state.price).argmax(-1)
            shifted[experts, scale] = (before != after).float().mean().item()
    assert 0.5 < shifted[8, "nats"] / shifted[384, "nats"] < 2
    assert shifted[384, "affinity"] > 2 * shifted[8, "affinity"]


# --- SMEBU -------------------------------------------------------------------------------------


def smebu_bias(loads, speed, momentum, clamp):
    """Bias after these loads (steps, E), as arXiv 2602.17004 updates it; the price is −bias."""
    bias, velocity = np.zeros(loads.shape[1]), np.zeros(loads.shape[1])
    for counts in loads:
        error = (counts.mean() - counts) / counts.mean()
        step = speed * np.tanh(clamp * error)
        velocity = momentum * velocity + (1 - momentum) * (step - step.mean())
        bias = bias + velocity
    return bias


@pytest.mark.parametrize("scale", ["affinity", "nats"])
def test_smebu_follows_its_formula_over_thirty_steps(scale):
    loads = np.random.default_rng(0).integers(1, 90, (30, 8)).astype(np.float64)
    method = SMEBU(speed=0.01, momentum=0.7, clamp=1.5, scale=scale)
    state = to_double(method.init(8))
    for counts in torch.from_numpy(loads):
        state = method.update(state, Sums(counts, counts, counts.sum()))
    np.testing.assert_allclose(state.price.numpy(), -smebu_bias(loads, 0.01, 0.7, 1.5), atol=1e-12)


def test_smebu_comes_to_rest_where_the_sign_rule_swings():
    """Alternating loads within 1 % of even: the sign rule moves by its full step all the same."""
    moves = {}
    for method in (SMEBU(speed=0.01), LossFree(speed=0.01)):
        state, prices = method.init(4), []
        for step in range(40):
            counts = 100 + torch.tensor([1.0, -1.0, 1.0, -1.0]) * (-1) ** step
            state = method.update(state, Sums(counts, counts, torch.tensor(200.0)))
            prices.append(state.price)
        moves[type(method)] = torch.stack(prices).diff(dim=0).abs().max().item()
    assert moves[SMEBU] < 0.03 * moves[LossFree]


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"clamp": 0.0}, {"speed": -1.0}], ids=str)
def test_smebu_refuses_numbers_out_of_range_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SMEBU(**wrong)


# --- one domain a step -------------------------------------------------------------------------

EXPERTS, TOP_K = 32, 4


def text_of(domain: int, tokens: int, *, seed: int) -> torch.Tensor:
    """Logits of text of one of four domains, whose experts differ."""
    of_domain = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(100 + domain))
    noise = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(1000 + seed))
    return of_domain + noise


def load_under(price: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    chosen = (logits - price).topk(TOP_K).indices
    return torch.bincount(chosen.flatten(), minlength=EXPERTS).float()


def resting_maxvio(method) -> float:
    """MaxVio over all domains, where every step holds one of them; mean over the last steps."""
    state, found = method.init(EXPERTS), []
    whole = torch.cat([text_of(domain, 1024, seed=domain) for domain in range(4)])
    turns = torch.randint(4, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    for step, domain in enumerate(turns):
        counts = load_under(state.price, text_of(domain, 256, seed=step))
        state = method.update(state, Sums(counts, counts, counts.sum()))
        if step >= 400 and step % 10 == 0:
            found.append(metrics.max_violation(load_under(state.price, whole)).item())
    return sum(found) / len(found)


def test_where_each_step_has_one_domain_the_error_itself_evens_out_all_of_them():
    assert resting_maxvio(LossFree(scale="nats")) < 0.3
    for method in (LossFree(scale="nats", rule="sign"), SMEBU(scale="nats")):
        assert resting_maxvio(method) > 0.8


# --- Sinkhorn ---------------------------------------------------------------------------------


def sinkhorn_knopp(kernel, iterations):
    """Alternate the scaling of rows to mass 1 and columns to mass T/E, in plain space."""
    tokens, num_experts = kernel.shape
    columns = np.ones(num_experts)
    for _ in range(iterations):
        rows = 1 / (kernel @ columns)
        columns = tokens / num_experts / (kernel.T @ rows)
    return columns


@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=repr)
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_sinkhorn_knopp(gate, iterations):
    method = Sinkhorn(iterations=iterations, temperature=0.7)
    logits = random_logits(40, 8, dtype=torch.float64)
    affinities = gate.affinities(logits).numpy()
    columns = sinkhorn_knopp(affinities ** (1 / 0.7), iterations)
    ranked = method.preference((), gate, logits, mask=None, training=True)
    found = ranked - gate.log_affinity(logits) / 0.7
    expected = np.log(columns)
    np.testing.assert_allclose(
        (found - found.mean(-1, keepdim=True)).numpy(),
        np.broadcast_to(expected - expected.mean(), found.shape),
        atol=1e-12,
    )


def test_sinkhorn_plan_gives_every_expert_the_same_mass():
    method = Sinkhorn(iterations=200)
    logits = random_logits(64, 8, dtype=torch.float64)
    plan = method.preference((), Softmax(), logits, mask=None, training=True).softmax(-1)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 8.0, dtype=torch.float64))


def test_sinkhorn_balances_a_skewed_batch_in_training_and_leaves_evaluation_alone():
    method, logits = Sinkhorn(), skewed_logits(1024, 16, 0)
    assert method.preference((), Softmax(), logits, mask=None, training=False) is None
    ranked = method.preference((), Softmax(), logits, mask=None, training=True)
    counts = [measure(route(logits, r.topk(2).indices, Softmax())).counts for r in (logits, ranked)]
    before, after = (metrics.max_violation(c).item() for c in counts)
    assert before > 2.5
    assert after < 0.2
