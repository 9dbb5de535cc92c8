"""The penalty on a router's weight, by its two formulas."""

from __future__ import annotations

import pytest
import torch

from moebalance.methods import orthogonality


def weight(rows=5, columns=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def test_gram_is_the_sum_of_what_the_products_of_rows_lack_of_the_identity():
    w = weight(3)
    expected = sum(abs(float(w[i] @ w[j]) - (i == j)) for i in range(3) for j in range(3))
    assert orthogonality(w, "gram").item() == pytest.approx(expected)


def test_cosine_is_the_mean_square_of_the_cosines_between_rows():
    w = weight(3)
    cosine = torch.nn.functional.cosine_similarity(w[:, None], w[None, :], dim=-1)
    expected = cosine.square().sum().item() - 3  # the diagonal is 1 and is taken off
    assert orthogonality(w).item() == pytest.approx(expected / 9)
    assert orthogonality(w * torch.tensor([[1.0], [2.0], [30.0]])).item() == pytest.approx(
        expected / 9
    )


@pytest.mark.parametrize("form", ["cosine", "gram"])
def test_its_gradient_is_right_and_drives_the_rows_apart(form):
    w = weight().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: orthogonality(w, form), w)
    optimizer = torch.optim.SGD([w], lr=0.01 if form == "gram" else 1.0)
    before = orthogonality(w, form).item()
    for _ in range(300):
        optimizer.zero_grad()
        orthogonality(w, form).backward()
        optimizer.step()
    assert orthogonality(w, form).item() < 0.1 * before


def test_half_precision_is_computed_in_float32():
    found = orthogonality(weight().bfloat16())
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(orthogonality(weight()).item(), rel=0.02)


def test_a_row_of_zeros_has_a_finite_gradient():
    w = weight().index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    orthogonality(w).backward()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize(
    ("given", "form", "error", "words"),
    [
        (torch.empty(0), "cosine", ValueError, "Gather a partitioned weight"),
        (torch.ones(1, 4), "cosine", ValueError, "two"),
        (torch.ones(4, 4, dtype=torch.uint8), "gram", TypeError, "uint8"),
        ([[1.0, 2.0]], "gram", TypeError, "list"),
        (torch.ones(2, 4), "l1", ValueError, "'cosine' or 'gram'"),
    ],
)
def test_what_is_no_router_weight_is_refused(given, form, error, words):
    with pytest.raises(error, match=words):
        orthogonality(given, form)
