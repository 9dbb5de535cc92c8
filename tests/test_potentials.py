"""Laws that every potential obeys, in float64, and the values of the paper's table from scipy."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moebalance.potentials
from moebalance.potentials import (
    POTENTIALS,
    Euclidean,
    LogCosh,
    LpNorm,
    NegativeEntropy,
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


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(-1)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(logits, st.integers(1, 8))
@laws
def test_exact_where_experts_are_empty(potential, dtype, numbers, empty):
    support = simplex(numbers).to(dtype)
    m = torch.cat([support, support.new_zeros(empty)]).requires_grad_()
    base = plain(potential)
    c = base.slope(len(m)) if isinstance(potential, UnitSlope) else 1.0
    each = math.log(2) if isinstance(base, Softplus) else 0.0
    value = potential.value(m)
    torch.testing.assert_close(value, (base.value(support) + empty * each) / c)
    (derivative,) = torch.autograd.grad(value, m)
    assert derivative.isfinite().all()
    prices = potential.grad(m.detach())
    assert prices.isfinite().all()
    assert (prices[-empty:] <= prices.min()).all()


@plain_potentials
def test_one_expert_serving_all_has_the_value_of_a_corner(potential):
    corner = vector([0.0, 1.0, 0.0, 0.0])
    expected = table_value(potential, corner.numpy())
    assert potential.value(corner).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("potential", "price"),
    [
        (NegativeEntropy(), math.log(torch.finfo(torch.float32).tiny) + 1),
        (Tsallis(alpha=1.1), -10.0),
        (Tsallis(alpha=0.5), 2 - torch.finfo(torch.float32).eps ** -0.5),
        (Renyi(alpha=0.5), -(torch.finfo(torch.float32).eps ** -0.5)),
        (LpNorm(1.5), 0.0),
    ],
    ids=repr,
)
def test_price_of_an_empty_expert(potential, price):
    prices = potential.grad(torch.tensor([0.0, 1.0]))
    # Rényi's sum over the experts also sees the empty one at machine epsilon: a part in 3000.
    assert prices[0].item() == pytest.approx(price, rel=1e-3)


@pytest.mark.parametrize("potential", [NegativeEntropy(), Tsallis(1.1), LpNorm(3.0)], ids=repr)
def test_prices_of_tiny_loads_are_not_floored_without_need(potential):
    m = torch.tensor([1e-30, 1e-20, 1e-10, 1.0])
    expected = potential.grad(m.double()).float()
    torch.testing.assert_close(potential.grad(m), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("potential", "outside"),
    [
        (SoftL1(), [-1.0, 1.0, 1.5]),
        (PseudoHuber(), [-1.5, 1.5]),
        (LogCosh(), [-1.5, 1.5]),
        (Softplus(), [-0.5, 1.5]),
        (Renyi(), [0.0, 0.5]),
        (Tsallis(alpha=0.5), [2.0, 3.0]),
    ],
    ids=repr,
)
def test_conjugate_is_infinite_outside_its_domain(potential, outside):
    inside = potential.grad(vector([0.5])).item()
    for price in outside:
        assert potential.conjugate(vector([inside, price])) == math.inf
        assert potential.unit_slope().conjugate(vector([inside, 1e6])) == math.inf


def test_conjugates_are_exact_on_the_boundary_of_their_domain():
    edge = vector([1.0, -1.0])
    assert PseudoHuber(0.5).conjugate(edge).item() == pytest.approx(1.0)
    assert LogCosh(2.0).conjugate(edge).item() == pytest.approx(math.log(2))
    assert Softplus().conjugate(vector([0.0, 1.0])).item() == 0
    assert Tsallis(alpha=2.0).conjugate(vector([-1.0, -7.0])).item() == 0
    assert Tsallis(alpha=2.0).conjugate_grad(vector([-1.0, -7.0])).tolist() == [0, 0]


@pytest.mark.parametrize("alpha", [1 - 1e-9, 1 + 1e-9])
def test_tsallis_tends_to_the_entropy(alpha):
    m, limit = simplex([0.0, 1.0, -3.0]), NegativeEntropy()
    tsallis, q = Tsallis(alpha=alpha), limit.grad(m)
    near = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(tsallis.value(m), limit.value(m), **near)
    torch.testing.assert_close(tsallis.grad(m), q, **near)
    torch.testing.assert_close(tsallis.conjugate(q), limit.conjugate(q), **near)
    torch.testing.assert_close(tsallis.conjugate_grad(q), m, **near)


def test_small_and_large_loads_lose_no_digits():
    m = torch.full((1,), 1e-5)
    assert PseudoHuber().value(m).item() == pytest.approx(0.5e-10, rel=1e-5)
    assert PseudoHuber().conjugate(m).item() == pytest.approx(0.5e-10, rel=1e-5)
    assert LogCosh(beta=100.0).value(vector([50.0])).item() == 50 - math.log(2) / 100
    assert Softplus().value(vector([25.0])).item() == 25 + math.log1p(math.exp(-25))


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


@potentials
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_float32_is_accurate(potential, dtype):
    m = torch.linspace(-2, 2, 8, dtype=torch.float64).softmax(-1)
    q = potential.grad(m)
    for method, x in (("value", m), ("grad", m), ("conjugate", q), ("conjugate_grad", q)):
        result = getattr(potential, method)(x.to(dtype))
        assert result.dtype == dtype
        expected = getattr(potential, method)(x)
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


@plain_potentials
def test_potentials_are_values(potential):
    assert potential == eval(repr(potential))
    assert hash(potential) == hash(eval(repr(potential)))
    with pytest.raises(AttributeError):
        potential.strength = 1.0


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LpNorm(p=1.0), r"LpNorm\(p=1.0\).*above 1"),
        (lambda: LpNorm(p=math.inf), r"LpNorm\(p=inf\).*finite"),
        (lambda: SoftL1(delta=0.0), r"SoftL1\(delta=0.0\).*above 0"),
        (lambda: PseudoHuber(delta=-1.0), r"PseudoHuber\(delta=-1.0\).*above 0"),
        (lambda: LogCosh(beta=math.nan), r"LogCosh\(beta=nan\).*above 0"),
        (lambda: Tsallis(alpha=0.0), r"Tsallis\(alpha=0.0\).*above 0"),
        (lambda: Tsallis(alpha=1), r"Tsallis\(alpha=1\).*NegativeEntropy"),
        (lambda: Renyi(alpha=0.0), r"Renyi\(alpha=0.0\).*between 0 and 1"),
        (lambda: Renyi(alpha=1.0), r"Renyi\(alpha=1.0\).*Tsallis above 1"),
        (lambda: UnitSlope(LogCosh(beta=1e5)).grad(torch.ones(4) / 4), r"slope 0.0 at 4 experts"),
    ],
)
def test_impossible_parameters_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_doctests():
    package = moebalance.potentials
    names = [f"{package.__name__}.{found.name}" for found in pkgutil.iter_modules(package.__path__)]
    results = [doctest.testmod(importlib.import_module(name)) for name in names]
    assert sum(result.attempted for result in results) >= 10
    assert sum(result.failed for result in results) == 0
