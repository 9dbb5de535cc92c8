"""Potentials made of potentials: divergences from shares, of groups, and sums on several levels."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode

from moebalance import Euclidean, NegativeEntropy, PhiBalancing
from moebalance.potentials import Combined, Grouped, Relative, Tsallis
from potential_cases import laws, logit_pairs, plain_potentials, prices_in_domain, simplex, vector

BY_NAME = (0, 1, 1, 0, 2, 1)


def centred(q: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return q - (q @ m)


# --- relative to shares -------------------------------------------------------------------------


def test_the_divergences_are_those_of_the_books():
    m, proportions = simplex([0.3, -1.0, 2.0, 0.1]), (4, 1, 2, 1)
    rho = np.array(proportions) / 8
    kl = NegativeEntropy().relative_to(proportions).value(m).item()
    assert kl == pytest.approx(scipy.special.rel_entr(m.numpy(), rho).sum())
    euclidean = Euclidean().relative_to(proportions).value(m).item()
    assert euclidean == pytest.approx(0.5 * ((m.numpy() - rho) ** 2).sum())


@plain_potentials
@given(logit_pairs)
@laws
def test_a_divergence_is_zero_at_the_shares_and_positive_elsewhere(potential, pairs):
    m, rho = simplex([a for a, _ in pairs]), simplex([b for _, b in pairs])
    aimed = potential.relative_to(rho.tolist())
    assert aimed.value(rho).item() == pytest.approx(0, abs=1e-12)
    assert aimed.grad(rho).abs().max() < 1e-9 * (1 + potential.grad(rho).abs().max())
    assert aimed.value(m) >= -1e-12
    if (m - rho).norm() > 0.05:
        assert aimed.value(m) > 0


@plain_potentials
@given(logit_pairs)
@laws
def test_the_laws_of_conjugates_hold_relative_to_shares(potential, pairs):
    m, rho = simplex([a for a, _ in pairs]), simplex([b for _, b in pairs])
    aimed = Relative(potential, tuple(rho.tolist()))
    q = aimed.grad(m)
    young = aimed.value(m) + aimed.conjugate(q) - (m * q).sum()
    assert young.abs() < 1e-8 * (1 + q.abs().max())
    torch.testing.assert_close(aimed.conjugate_grad(q), m, rtol=1e-6, atol=1e-9)
    live = m.clone().requires_grad_()
    (slope,) = torch.autograd.grad(aimed.value(live), live)
    torch.testing.assert_close(q, slope, rtol=1e-7, atol=1e-9)
    elsewhere = prices_in_domain(potential, [b for _, b in pairs]) - potential.grad(rho)
    assert aimed.value(m) + aimed.conjugate(elsewhere) >= (m * elsewhere).sum() - 1e-9


@plain_potentials
@given(logit_pairs)
@laws
def test_equal_shares_are_the_potential_itself(potential, pairs):
    m = simplex([a for a, _ in pairs])
    aimed = potential.relative_to([3.0] * len(m))
    q = potential.grad(m)
    close = {"rtol": 1e-9, "atol": 1e-12 * (1 + q.abs().max().item())}
    torch.testing.assert_close(centred(aimed.grad(m), m), centred(q, m), **close)
    assert aimed.slope(len(m)) == potential.slope(len(m))
    uniform = torch.full_like(m, 1 / len(m))
    rise = potential.value(m) - potential.value(uniform)
    torch.testing.assert_close(aimed.value(m), rise, rtol=1e-7, atol=1e-10)


# --- of groups ----------------------------------------------------------------------------------


@plain_potentials
@given(logit_pairs)
@laws
def test_a_group_an_expert_is_the_potential_itself(potential, pairs):
    m, experts = simplex([a for a, _ in pairs]), len(pairs)
    q = prices_in_domain(potential, [b for _, b in pairs])
    for groups in (experts, tuple(range(experts))):
        grouped = potential.grouped(groups)
        assert torch.equal(grouped.value(m), potential.value(m))
        assert torch.equal(grouped.grad(m), potential.grad(m))
        torch.testing.assert_close(grouped.conjugate(q), potential.conjugate(q))
        torch.testing.assert_close(grouped.conjugate_grad(q), potential.conjugate_grad(q))
        assert grouped.slope(experts) == potential.slope(experts)


@plain_potentials
def test_one_group_of_all_pulls_at_nothing(potential):
    m = simplex([0.3, -1.0, 2.0, 0.1])
    price = potential.grouped(1).grad(m)
    assert centred(price, m).abs().max() < 1e-12
    assert potential.grouped(1).slope(4) == 0
    with pytest.raises(ValueError, match="slope 0"):
        potential.grouped(1).unit_slope().grad(m)


@pytest.mark.parametrize("groups", [2, 3, BY_NAME])
@plain_potentials
def test_the_laws_of_conjugates_hold_for_groups_where_there_is_a_conjugate(potential, groups):
    grouped = potential.grouped(groups)
    m = simplex([0.3, -1.0, 2.0, 0.1, 0.7, -0.4]).requires_grad_()
    (slope,) = torch.autograd.grad(grouped.value(m), m)
    m = m.detach()
    q = grouped.grad(m)
    torch.testing.assert_close(q, slope)
    torch.testing.assert_close(grouped.value(m) + grouped.conjugate(q), (m * q).sum())
    even = grouped.conjugate_grad(q)
    torch.testing.assert_close(grouped.loads(even), grouped.loads(m))
    torch.testing.assert_close(grouped.grad(even), q)
    assert even.norm() <= m.norm()
    within = q.clone()
    within[0] += 1e-3
    if potential.conjugate(within).isfinite():
        assert grouped.conjugate(within) == torch.inf


def test_groups_by_number_and_by_name_are_the_same():
    m = torch.rand(5, 6, dtype=torch.float64)
    for method in ("value", "grad", "conjugate_grad"):
        by_number = getattr(Tsallis().grouped(3), method)(m)
        by_name = getattr(Tsallis().grouped([0, 0, 1, 1, 2, 2]), method)(m)
        torch.testing.assert_close(by_number, by_name)


def test_loads_of_groups_are_sums_of_their_experts():
    m = simplex([0.3, -1.0, 2.0, 0.1, 0.7, -0.4])
    expected = np.bincount(BY_NAME, weights=m.numpy())
    np.testing.assert_allclose(Euclidean().grouped(BY_NAME).loads(m).numpy(), expected)


@plain_potentials
def test_groups_relative_to_shares_are_the_shares_of_the_groups(potential):
    m, proportions = simplex([0.3, -1.0, 2.0, 0.1, 0.7, -0.4]), vector([4, 1, 2, 1, 3, 1])
    of_experts = potential.grouped(BY_NAME).relative_to(proportions.tolist())
    of_groups = potential.relative_to(Euclidean().grouped(BY_NAME).loads(proportions).tolist())
    other = of_groups.grouped(BY_NAME)
    torch.testing.assert_close(of_experts.grad(m), other.grad(m))
    torch.testing.assert_close(of_experts.value(m), other.value(m))


def test_balancing_groups_is_phi_balancing_of_the_groups_own_loads():
    batches = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).softmax(-1).double()
    average, of_groups = batches[0], Euclidean().grouped(3).loads(batches[0])
    for batch in batches[1:]:
        average = 0.7 * average + 0.3 * batch
        of_groups = 0.7 * of_groups + 0.3 * Euclidean().grouped(3).loads(batch)
    price = NegativeEntropy().grouped(3).grad(average)
    expected = NegativeEntropy().grad(of_groups).repeat_interleave(2)
    torch.testing.assert_close(price, expected)


# --- on several levels --------------------------------------------------------------------------


def test_levels_add_up_in_value_price_and_slope():
    levels = 2 * NegativeEntropy().grouped(2) + NegativeEntropy() * 0.1 + 0.5 * Euclidean()
    m = simplex([0.3, -1.0, 2.0, 0.1]).requires_grad_()
    (slope,) = torch.autograd.grad(levels.value(m), m)
    m = m.detach()
    torch.testing.assert_close(levels.grad(m), slope)
    expected = 2 * NegativeEntropy().grouped(2).grad(m) + 0.1 * NegativeEntropy().grad(m) + 0.5 * m
    torch.testing.assert_close(levels.grad(m), expected)
    assert levels.weights == (2.0, 0.1, 0.5)
    assert (3 * levels).weights == pytest.approx((6.0, 0.3, 1.5))
    # Across the two halves the price rises by the slope, within them by less.
    uniform, step = torch.full((4,), 0.25, dtype=torch.float64), 1e-6
    across, within = vector([1, 1, -1, -1]) * step, vector([1, -1, 0, 0]) * step
    rise = levels.grad(uniform + across) - levels.grad(uniform)
    torch.testing.assert_close(rise, levels.slope(4) * across, rtol=1e-4, atol=0)
    rise = levels.grad(uniform + within) - levels.grad(uniform)
    torch.testing.assert_close(rise, (0.1 * 4 + 0.5) * within, rtol=1e-4, atol=1e-12)
    assert levels.unit_slope().slope(4) == 1


def test_a_weighted_potential_keeps_its_conjugate_and_a_sum_has_none():
    m = simplex([0.3, -1.0, 2.0])
    weighted = 0.3 * NegativeEntropy()
    q = weighted.grad(m)
    torch.testing.assert_close(weighted.conjugate_grad(q), m)
    torch.testing.assert_close(weighted.value(m) + weighted.conjugate(q), (m * q).sum())
    for call in (weighted + Euclidean()).conjugate, (weighted + Euclidean()).conjugate_grad:
        with pytest.raises(NotImplementedError, match="no closed form"):
            call(q)


def test_what_a_potential_aims_at_is_known():
    assert NegativeEntropy().aim is None
    aimed = NegativeEntropy().relative_to((3, 1))
    assert aimed.aim == aimed.unit_slope().aim == (0.1 * aimed + Euclidean()).aim == (3, 1)
    assert (aimed + Euclidean().relative_to((1, 3))).aim is None
    assert PhiBalancing(aimed).traits.aim == (3, 1)


# --- as hyper-parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_price_keeps_the_dtype_and_takes_leading_axes(dtype):
    potential = NegativeEntropy().grouped(BY_NAME) + Euclidean().relative_to((1, 2, 3, 1, 2, 3))
    m = torch.rand(2, 3, 6, dtype=dtype)
    assert potential.grad(m).dtype == potential.value(m).dtype == dtype
    assert potential.value(m).shape == (2, 3)
    torch.testing.assert_close(potential.grad(m)[1, 2], potential.grad(m[1, 2]))
    torch.testing.assert_close(torch.vmap(potential.grad)(m), potential.grad(m))


class Watched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_price_copies_nothing_from_the_host_and_waits_for_nothing():
    potential = NegativeEntropy().grouped(BY_NAME) + Euclidean().relative_to((1, 2, 3, 1, 2, 3))
    with Watched() as watched:
        potential.grad(torch.rand(6))
    assert "full" in watched.called
    assert not watched.called & {"lift_fresh", "_to_copy", "_local_scalar_dense", "nonzero"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: NegativeEntropy().relative_to((1, 0)), "finite number above 0"),
        (lambda: NegativeEntropy().relative_to((1, 2)).grad(torch.rand(3)), "2 experts, .* has 3"),
        (lambda: NegativeEntropy().grouped(0), "1 group or more"),
        (lambda: NegativeEntropy().grouped((0, 2)), "from 0 on"),
        (lambda: NegativeEntropy().grouped(3).grad(torch.rand(4)), "do not make 3 equal groups"),
        (
            lambda: NegativeEntropy().grouped((0, 1)).grad(torch.rand(4)),
            "groups of 2 experts, not 4",
        ),
        (lambda: NegativeEntropy().grouped((0, 1, 1)).slope(3), "no single slope"),
        (lambda: -1 * NegativeEntropy(), "above 0"),
        (lambda: Combined((), ()), "one or more"),
        (
            lambda: PhiBalancing(NegativeEntropy().relative_to((1, 2))).init(3),
            "2 experts, .* has 3",
        ),
        (lambda: PhiBalancing(NegativeEntropy().grouped(3)).init(4), "do not make 3 equal groups"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_what_is_no_potential_or_number_is_not_composed():
    with pytest.raises(TypeError):
        NegativeEntropy() + 1.0
    with pytest.raises(TypeError):
        NegativeEntropy() * "2"
    with pytest.raises(TypeError, match="must be numbers"):
        NegativeEntropy().relative_to("ab")


def test_composed_potentials_are_values():
    levels = Grouped(NegativeEntropy(), [0, 1, 1]).relative_to([1, 2, 1.5]) + Euclidean()
    again = eval(repr(levels), {}, vars(__import__("moebalance.potentials").potentials))
    assert again == levels
    assert hash(again) == hash(levels)
