"""Laws that every potential obeys, in float64, and the values of the paper's table from scipy."""

from __future__ import annotations

import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebalance import Euclidean, NegativeEntropy
from moebalance.potentials import POTENTIALS, LpNorm, Renyi, Softplus, Tsallis, UnitSlope
from potential_cases import (
    PLAIN,
    laws,
    logit_pairs,
    logits,
    plain_potentials,
    potentials,
    prices_in_domain,
    simplex,
    table_conjugate,
    table_value,
)


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1)


def test_every_potential_of_the_table_is_a_case():
    assert {type(potential) for potential in PLAIN} == set(POTENTIALS)
    assert len(POTENTIALS) == 9


@plain_potentials
@given(logits)
@laws
def test_value_is_the_tables(potential, numbers):
    m = simplex(numbers)
    assert potential.value(m).item() == pytest.approx(
        table_value(potential, m.numpy()), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize(
    "potential", [p for p in PLAIN if not isinstance(p, (Tsallis, Renyi))], ids=repr
)
@given(logits)
@laws
def test_conjugate_is_the_tables(potential, numbers):
    q = prices_in_domain(potential, numbers)
    expected = table_conjugate(potential, q.numpy())
    assert potential.conjugate(q).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@potentials
@given(logits)
@laws
def test_grad_is_the_derivative_of_value(potential, numbers):
    m = simplex(numbers).requires_grad_()
    (derivative,) = torch.autograd.grad(potential.value(m), m)
    torch.testing.assert_close(potential.grad(m.detach()), derivative, rtol=1e-9, atol=1e-12)


@potentials
@given(logits)
@laws
def test_conjugate_grad_is_the_derivative_of_conjugate(potential, numbers):
    q = prices_in_domain(potential, numbers).requires_grad_()
    (derivative,) = torch.autograd.grad(potential.conjugate(q), q)
    torch.testing.assert_close(
        potential.conjugate_grad(q.detach()), derivative, rtol=1e-8, atol=1e-12
    )


@potentials
@given(logits)
@laws
def test_fenchel_young_is_an_equality_at_the_price(potential, numbers):
    m = simplex(numbers)
    q = potential.grad(m)
    left = potential.value(m) + potential.conjugate(q)
    torch.testing.assert_close(left, inner(m, q), rtol=1e-10, atol=1e-10)


@potentials
@given(logit_pairs)
@laws
def test_fenchel_young_is_an_inequality_elsewhere(potential, pairs):
    m = simplex([a for a, _ in pairs])
    q = prices_in_domain(potential, [b for _, b in pairs])
    bound = inner(m, q)
    excess = potential.value(m) + potential.conjugate(q) - bound
    assert excess >= -1e-11 * (1 + bound.abs())
    gap = (m - potential.conjugate_grad(q)).abs().max()
    assert excess > 0 or gap < 1e-4


@potentials
@given(logits)
@laws
def test_conjugate_grad_inverts_grad(potential, numbers):
    m = simplex(numbers)
    torch.testing.assert_close(potential.conjugate_grad(potential.grad(m)), m, rtol=1e-8, atol=0)


@potentials
@given(logits)
@laws
def test_grad_inverts_conjugate_grad_off_the_simplex(potential, numbers):
    q = prices_in_domain(potential, [x / 4 for x in numbers])
    m = potential.conjugate_grad(q)
    inside = m > 1e-6
    torch.testing.assert_close(potential.grad(m)[inside], q[inside], rtol=1e-7, atol=1e-9)


@potentials
@given(logits, st.randoms(use_true_random=False))
@laws
def test_relabelling_the_experts_relabels_the_prices(potential, numbers, random):
    order = list(range(len(numbers)))
    random.shuffle(order)
    m = simplex(numbers)
    torch.testing.assert_close(potential.value(m[order]), potential.value(m))
    torch.testing.assert_close(potential.grad(m[order]), potential.grad(m)[order])
    q = prices_in_domain(potential, numbers)
    torch.testing.assert_close(potential.conjugate(q[order]), potential.conjugate(q))


@potentials
@given(logits)
@laws
def test_uniform_is_the_strict_minimum_on_the_simplex(potential, numbers):
    m = simplex(numbers)
    uniform = torch.full_like(m, 1 / len(m))
    prices = potential.grad(uniform)
    torch.testing.assert_close(prices, prices.mean().expand_as(prices))
    if (m - uniform).norm() > 1e-2:
        assert potential.value(m) > potential.value(uniform) + 1e-8


@potentials
@given(logit_pairs)
@laws
def test_strictly_convex_at_midpoints(potential, pairs):
    a, b = simplex([x for x, _ in pairs]), simplex([y for _, y in pairs])
    middle, ends = potential.value((a + b) / 2), (potential.value(a) + potential.value(b)) / 2
    assert middle <= ends + 1e-13
    if (a - b).norm() > 1e-2:
        assert middle < ends - 1e-9


@potentials
@given(logits)
@laws
def test_an_expert_with_more_load_costs_more(potential, numbers):
    m = simplex(numbers).sort().values
    rises = potential.grad(m).diff()
    assert (rises >= -1e-13).all()
    assert (rises[m.diff() > 1e-6] > 0).all()


@potentials
@pytest.mark.parametrize("rate", [0.05, 0.7])
def test_mirror_ascent_on_the_price_is_a_moving_average_of_the_load(potential, rate):
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(20, 16, dtype=torch.float64, generator=generator).softmax(-1)
    m = torch.full((16,), 1 / 16, dtype=torch.float64)
    q = potential.grad(m)
    for p in batches:
        m = (1 - rate) * m + rate * p
        load = potential.conjugate_grad(q)
        q = potential.grad(load + rate * (p - load))
    torch.testing.assert_close(potential.conjugate_grad(q), m, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(q, potential.grad(m), rtol=1e-9, atol=1e-12)


@potentials
@pytest.mark.parametrize("num_experts", [2, 5, 16, 64, 256])
def test_slope_is_the_finite_difference_of_the_price_at_uniform(potential, num_experts):
    uniform = torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    direction = torch.randn(
        num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(num_experts)
    )
    direction = direction - direction.mean()
    step = 1e-5 / num_experts
    rise = potential.grad(uniform + step * direction) - potential.grad(uniform - step * direction)
    slope = potential.slope(num_experts)
    torch.testing.assert_close(rise / (2 * step), slope * direction, rtol=1e-5, atol=1e-7 * slope)
    assert slope == 1 or not isinstance(potential, UnitSlope)


@pytest.mark.parametrize(
    ("potential", "slope"),
    [
        (NegativeEntropy(), 64.0),
        (Euclidean(), 1.0),
        (LpNorm(3.0), 2 / 64),
        (Renyi(0.5), 32.0),
        (Softplus(), scipy.special.expit(1 / 64) * scipy.special.expit(-1 / 64)),
    ],
    ids=repr,
)
def test_slopes_at_64_experts(potential, slope):
    assert potential.slope(64) == pytest.approx(slope)


def test_unit_slope_follows_the_number_of_experts_and_stops_at_one():
    scaled = NegativeEntropy().unit_slope()
    for num_experts in (4, 32):
        m = torch.arange(1.0, num_experts + 1).softmax(-1)
        torch.testing.assert_close(scaled.grad(m), NegativeEntropy().grad(m) / num_experts)
    torch.testing.assert_close(scaled.unit_slope().grad(m), scaled.grad(m))


@potentials
def test_leading_axes_equal_a_loop(potential):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator)
    m = rows.softmax(-1)
    q = torch.stack(
        [torch.stack([prices_in_domain(potential, x.tolist()) for x in y]) for y in rows]
    )
    for method, x in (("value", m), ("grad", m), ("conjugate", q), ("conjugate_grad", q)):
        whole = getattr(potential, method)(x)
        loop = torch.stack([torch.stack([getattr(potential, method)(v) for v in y]) for y in x])
        torch.testing.assert_close(whole, loop, rtol=1e-13, atol=1e-14)
