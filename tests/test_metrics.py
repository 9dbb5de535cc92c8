"""Every metric against a short numpy transcription, its extremes, and the laws they share."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moebalance.metrics
import moebalance.metrics.load
import moebalance.metrics.specialisation
from moebalance.metrics import (
    churn,
    coactivation,
    coefficient_of_variation,
    dead_fraction,
    expert_purity,
    gini,
    max_violation,
    min_violation,
    mutual_information,
    normalized_entropy,
    price_spread,
    purity,
    router_similarity,
    sampling_floor,
    served_fraction,
    soft_hard_gap,
)

# name: (metric, numpy form on counts, value at uniform, value at one-hot as a function of E)
LOAD_METRICS = {
    "max_violation": (max_violation, lambda c: c.max() / c.mean() - 1, 0, lambda E: E - 1),
    "min_violation": (min_violation, lambda c: 1 - c.min() / c.mean(), 0, lambda E: 1),
    "coefficient_of_variation": (
        coefficient_of_variation,
        scipy.stats.variation,
        0,
        lambda E: math.sqrt(E - 1),
    ),
    "gini": (
        gini,
        lambda c: np.abs(c[:, None] - c[None]).mean() / (2 * c.mean()),
        0,
        lambda E: 1 - 1 / E,
    ),
    "normalized_entropy": (
        normalized_entropy,
        lambda c: scipy.stats.entropy(c, base=len(c)),
        1,
        lambda E: 0,
    ),
    "dead_fraction": (
        dead_fraction,
        lambda c: np.mean(c / c.mean() < 0.01),
        0,
        lambda E: 1 - 1 / E,
    ),
    "served_fraction": (
        served_fraction,
        lambda c: np.minimum(c, c.mean()).sum() / c.sum(),
        1,
        lambda E: 1 / E,
    ),
}
load_metrics = pytest.mark.parametrize(
    ("metric", "numpy_form", "at_uniform", "at_one_hot"), LOAD_METRICS.values(), ids=LOAD_METRICS
)
laws = settings(max_examples=40, deadline=None, derandomize=True)
counts = st.lists(st.integers(0, 1000), min_size=2, max_size=32).filter(any)
count_pairs = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=2, max_size=32
).filter(lambda pairs: any(a for a, _ in pairs) and any(b for _, b in pairs))
tables = st.integers(2, 6).flatmap(
    lambda e: st.lists(
        st.lists(st.integers(0, 50), min_size=e, max_size=e), min_size=2, max_size=5
    ).filter(lambda rows: any(map(any, rows)))
)


def doubles(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@load_metrics
@given(numbers=counts)
@laws
def test_load_metrics_match_numpy(metric, numpy_form, at_uniform, at_one_hot, numbers):
    expected = numpy_form(np.array(numbers, dtype=float))
    assert metric(doubles(numbers)).item() == pytest.approx(expected, abs=1e-12)


@load_metrics
@pytest.mark.parametrize("num_experts", [2, 7, 64])
def test_load_metrics_at_their_extremes(metric, numpy_form, at_uniform, at_one_hot, num_experts):
    uniform = torch.full((num_experts,), 13)
    one_hot = torch.zeros(num_experts)
    one_hot[1] = 5.0
    assert metric(uniform).item() == pytest.approx(at_uniform, abs=1e-6)
    assert metric(one_hot).item() == pytest.approx(at_one_hot(num_experts), abs=1e-5)


@load_metrics
@given(numbers=counts)
@laws
def test_load_metrics_stay_between_their_extremes(
    metric, numpy_form, at_uniform, at_one_hot, numbers
):
    low, high = sorted((at_uniform, at_one_hot(len(numbers))))
    assert low - 1e-12 <= metric(doubles(numbers)).item() <= high + 1e-12


@load_metrics
@given(numbers=counts, scale=st.integers(1, 1000), random=st.randoms(use_true_random=False))
@laws
def test_load_metrics_ignore_scale_and_order(
    metric, numpy_form, at_uniform, at_one_hot, numbers, scale, random
):
    shuffled = random.sample(numbers, len(numbers))
    # Through shares, as a running average holds them: no count survives exactly.
    share = doubles(shuffled) / (scale * sum(shuffled))
    assert metric(share).item() == pytest.approx(metric(doubles(numbers)).item(), abs=1e-12)


@load_metrics
def test_load_metrics_treat_leading_axes_as_a_loop(metric, numpy_form, at_uniform, at_one_hot):
    load = torch.randint(0, 50, (3, 4, 8), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([metric(row) for row in rows]) for rows in load])
    torch.testing.assert_close(metric(load), expected)
    assert metric(load).dtype == torch.float32
    assert metric(load.double()).dtype == torch.float64
    assert metric(load.bfloat16()).dtype == torch.float32


@load_metrics
def test_an_empty_load_is_nan_and_spoils_no_other(metric, numpy_form, at_uniform, at_one_hot):
    values = metric(torch.tensor([[0, 0, 0], [1, 2, 3]]))
    assert values.isnan().tolist() == [True, False]


def test_counts_beyond_half_precision_are_summed_in_float32():
    load = torch.full((64,), 2000.0, dtype=torch.float16)
    assert max_violation(load).item() == 0
    assert served_fraction(load).item() == 1


def test_entropy_of_an_even_load_never_exceeds_one():
    for num_experts in range(2, 300):
        assert normalized_entropy(torch.ones(num_experts)).item() <= 1


@given(counts, st.floats(0.001, 1))
@laws
def test_dead_fraction_counts_experts_below_the_threshold(numbers, threshold):
    limit = threshold * sum(numbers) / len(numbers)
    clear = [c for c in numbers if abs(c - limit) > 1e-9 * max(limit, 1)]
    lowest = sum(c < limit for c in clear) / len(numbers)
    highest = lowest + (len(numbers) - len(clear)) / len(numbers)
    assert lowest - 1e-12 <= dead_fraction(doubles(numbers), threshold).item() <= highest + 1e-12


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan])
def test_dead_fraction_refuses_a_threshold_that_nothing_is_below(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold}"):
        dead_fraction(torch.ones(4), threshold)


@given(counts)
@laws
def test_what_is_not_served_is_the_distance_from_uniform(numbers):
    load = doubles(numbers)
    gap = soft_hard_gap(torch.ones_like(load), load)
    torch.testing.assert_close(1 - served_fraction(load), gap, rtol=0, atol=1e-12)


@given(count_pairs)
@laws
def test_soft_hard_gap_is_the_largest_difference_over_events(pairs):
    soft, hard = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    difference = soft / soft.sum() - hard / hard.sum()
    gap = soft_hard_gap(doubles(soft), doubles(hard)).item()
    assert gap == pytest.approx(difference[difference > 0].sum(), abs=1e-12)
    assert gap == pytest.approx(soft_hard_gap(doubles(hard), doubles(soft)).item(), abs=1e-12)
    assert -1e-12 <= gap <= 1 + 1e-12


def test_soft_hard_gap_at_its_extremes():
    assert soft_hard_gap(torch.tensor([0.1, 0.9]), torch.tensor([1, 9])).item() == 0
    assert soft_hard_gap(torch.tensor([0.0, 1.0]), torch.tensor([7, 0])).item() == 1


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(2048, 64, 1), (1024, 128, 8)])
def test_sampling_floor_bounds_the_violation_of_perfect_routing(tokens, num_experts, top_k):
    draws = np.random.default_rng(0).multinomial(
        tokens * top_k, np.full(num_experts, 1 / num_experts), size=400
    )
    simulated = (draws.max(1) / draws.mean(1) - 1).mean()
    floor = sampling_floor(tokens, num_experts, top_k)
    # The formula is the leading term of an expansion in 1/√(log E): above the mean by 10 to 25 %.
    assert 0.75 * floor < simulated < 0.95 * floor


def test_sampling_floor_scales_as_stated():
    assert sampling_floor(400, 16, 2) == pytest.approx(sampling_floor(100, 16, 2) / 2)
    assert sampling_floor(400, 16, 2) == pytest.approx(sampling_floor(200, 16, 4))
    assert sampling_floor(100, 16, 2) == pytest.approx(math.sqrt(2 * math.log(16) * 16 / 200))
    assert sampling_floor(100, 1, 1) == 0


@pytest.mark.parametrize(("tokens", "num_experts", "top_k"), [(0, 4, 1), (8, 4, 0), (8, 4, 5)])
def test_sampling_floor_refuses_impossible_routing(tokens, num_experts, top_k):
    with pytest.raises(ValueError, match=f"tokens={tokens}, num_experts={num_experts}"):
        sampling_floor(tokens, num_experts, top_k)


@given(tables)
@laws
def test_purity_is_the_load_weighted_mean_of_expert_purity(rows):
    table = np.array(rows, dtype=float)
    load = table.sum(0)
    each = expert_purity(doubles(rows)).numpy()
    assert np.isnan(each).tolist() == (load == 0).tolist()
    used = load > 0
    np.testing.assert_allclose(each[used], table.max(0)[used] / load[used])
    mean = purity(doubles(rows)).item()
    assert mean == pytest.approx(np.average(each[used], weights=load[used]))
    assert 1 / len(rows) - 1e-12 <= mean <= 1 + 1e-12


def test_purity_at_its_extremes():
    assert purity(torch.ones(4, 8)).item() == pytest.approx(1 / 4)
    assert purity(torch.eye(4)).item() == 1
    blind = torch.outer(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 1.0, 2.0]))
    assert purity(blind).item() == pytest.approx(3 / 4)


@given(tables)
@laws
def test_mutual_information_is_the_explicit_sum(rows):
    joint = np.array(rows, dtype=float) / np.sum(rows)
    by_domain, by_expert = joint.sum(1), joint.sum(0)
    explicit = sum(
        joint[d, e] * math.log(joint[d, e] / (by_domain[d] * by_expert[e]))
        for d, e in zip(*joint.nonzero(), strict=True)
    )
    information = mutual_information(doubles(rows)).item()
    assert information == pytest.approx(explicit, abs=1e-12)
    assert 0 <= information <= min(map(math.log, joint.shape)) + 1e-12
    transposed = mutual_information(doubles(rows).mT).item()
    assert information == pytest.approx(transposed, abs=1e-12)


def test_mutual_information_at_its_extremes():
    blind = torch.outer(torch.tensor([1.0, 3.0]), torch.tensor([5.0, 1.0, 2.0]))
    assert 0 <= mutual_information(blind).item() <= 1e-6
    assert mutual_information(torch.eye(8)).item() == pytest.approx(math.log(8))


def test_mutual_information_of_independent_axes_is_never_negative():
    generator = torch.Generator().manual_seed(0)
    domains = torch.rand(200, 5, 1, generator=generator)
    experts = torch.rand(200, 1, 16, generator=generator)
    information = mutual_information(domains * experts)
    assert (information >= 0).all()
    assert (information <= 2e-6).all()


def test_chance_information_is_as_large_as_stated():
    tokens, domains, experts = 2000, 4, 16
    draws = np.random.default_rng(0).multinomial(
        tokens, np.full(domains * experts, 1 / (domains * experts)), size=300
    )
    by_chance = mutual_information(doubles(draws).reshape(-1, domains, experts)).mean().item()
    assert by_chance == pytest.approx((domains - 1) * (experts - 1) / (2 * tokens), rel=0.1)


@pytest.mark.parametrize("metric", [purity, expert_purity, mutual_information])
def test_domain_metrics_treat_leading_axes_as_a_loop(metric):
    load = torch.randint(0, 50, (3, 2, 4, 8), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([metric(table) for table in t]) for t in load])
    torch.testing.assert_close(metric(load), expected)
    torch.testing.assert_close(metric(load * 7.0), expected)
    assert metric(torch.zeros(2, 3)).isnan().all()


def test_router_similarity_is_the_mean_cosine_of_pairs():
    rows = np.random.default_rng(0).normal(size=(3, 5, 7))
    norms = np.linalg.norm(rows, axis=-1)
    cosines = np.abs(rows @ rows.transpose(0, 2, 1)) / (norms[..., :, None] * norms[..., None, :])
    expected = [np.mean([c[i, j] for i in range(5) for j in range(5) if i != j]) for c in cosines]
    np.testing.assert_allclose(router_similarity(torch.tensor(rows)).numpy(), expected, rtol=1e-12)
    assert router_similarity(torch.eye(4)).item() == 0
    assert math.isnan(router_similarity(torch.ones(1, 3)).item())


@given(st.lists(st.permutations(range(5)), min_size=1, max_size=12), st.randoms())
@laws
def test_churn_compares_sets(before, random):
    after = [random.sample(order, 5) for order in before]
    expected = np.mean([set(a[:2]) != set(b[:2]) for a, b in zip(before, after, strict=True)])
    a, b = torch.tensor(before)[:, :2], torch.tensor(after)[:, :2]
    assert churn(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert churn(a, a.flip(-1)).item() == 0
    assert churn(a, a + 5).item() == 1


def test_churn_refuses_other_tokens():
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(5, 2\)"):
        churn(torch.zeros(4, 2, dtype=torch.long), torch.zeros(5, 2, dtype=torch.long))


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=20))
@laws
def test_coactivation_counts_pairs(orders):
    top_k, num_experts = 3, 7
    chosen = [set(order[:top_k]) for order in orders]
    proportions = coactivation(torch.tensor([order[:top_k] for order in orders]), num_experts)
    for i in range(num_experts):
        served = [experts for experts in chosen if i in experts]
        if not served:
            assert proportions[i].isnan().all()
            continue
        expected = [np.mean([j in experts for experts in served]) for j in range(num_experts)]
        np.testing.assert_allclose(proportions[i].numpy(), expected, rtol=1e-6)
        assert proportions[i].sum().item() == pytest.approx(top_k, rel=1e-6)
        assert proportions[i, i].item() == 1


def test_coactivation_of_even_mixing_is_as_stated():
    draws = torch.rand(20_000, 8, generator=torch.Generator().manual_seed(0)).topk(3).indices
    pairs = coactivation(draws, 8)[~torch.eye(8, dtype=torch.bool)]
    torch.testing.assert_close(pairs, torch.full_like(pairs, 2 / 7), rtol=0.1, atol=0)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=32), st.floats(-10, 10))
@laws
def test_price_spread_is_the_range_and_ignores_a_constant(numbers, constant):
    price = doubles(numbers)
    assert price_spread(price).item() == pytest.approx(np.ptp(numbers))
    shifted = price_spread(price + constant).item()
    assert shifted == pytest.approx(price_spread(price).item(), abs=1e-12)


def test_price_spread_keeps_leading_axes():
    assert price_spread(torch.tensor([[0.0, 2.0], [-1.0, -4.0]])).tolist() == [2.0, 3.0]


def test_doctests():
    rooms = (moebalance.metrics.load, moebalance.metrics.specialisation)
    results = [doctest.testmod(room) for room in rooms]
    assert sum(result.attempted for result in results) >= 15
    assert sum(result.failed for result in results) == 0
