"""Potentials where arithmetic is hard or refused: empty experts, edges of domains, limits."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moebalance.potentials
from moebalance import NegativeEntropy
from moebalance.potentials import (
    LogCosh,
    LpNorm,
    PseudoHuber,
    Renyi,
    SoftL1,
    Softplus,
    Tsallis,
    UnitSlope,
)
from potential_cases import (
    laws,
    logits,
    plain,
    plain_potentials,
    potentials,
    simplex,
    table_value,
    vector,
)


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
    again = eval(repr(potential), {}, vars(moebalance.potentials))
    assert potential == again
    assert hash(potential) == hash(again)
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
