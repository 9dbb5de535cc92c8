"""Laws that every balancing method obeys; the methods are listed in `cases.py`."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moebalance as mb
from cases import (
    add,
    one_batch,
    permute,
    plain_top_k,
    random_logits,
    random_routing,
    skewed_state,
    tensors,
    to_double,
)
from laws import (
    close,
    columns,
    every_gate,
    every_method,
    every_method_of_eight,
    few,
    identical,
    preference,
    seeds,
    sizes,
)
from moebalance.methods import observe
from moebalance.routing import route

# --- statistics -------------------------------------------------------------------------------


@every_method
@given(size=sizes, other_tokens=st.integers(0, 30), seed=seeds, padded=st.booleans())
@few
def test_sums_of_a_concatenation_are_the_sums_of_the_parts(
    method, size, other_tokens, seed, padded
):
    tokens, num_experts, top_k = size
    state = skewed_state(method, num_experts)
    a = random_routing(tokens, num_experts, top_k, seed=seed, padded=padded)
    b = random_routing(max(other_tokens, 1), num_experts, top_k, seed=seed + 1, padded=padded)
    mask = None if not padded else torch.cat([a.mask, b.mask])
    both = route(
        torch.cat([a.logits, b.logits]), torch.cat([a.experts, b.experts]), a.gate, mask=mask
    )
    whole = observe(method, state, both)
    close(whole, add(observe(method, state, a), observe(method, state, b)))


@every_method_of_eight
def test_extra_sums_have_the_announced_shapes(method):
    routing = random_routing(10, 8)
    extra = observe(method, method.init(8), routing).extra
    assert tuple(tuple(tensor.shape) for tensor in extra) == method.extra_shapes(8)


@every_method_of_eight
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_state_sums_and_gradient_are_float32_whatever_the_logits(method, dtype):
    routing = random_routing(24, 8, dtype=dtype)
    state = method.init(8)
    for _ in range(2):
        batch = one_batch(method, state, routing)
        results = [*tensors(state), *tensors(batch.sums)]
        results += [method.penalty_gradient(state, batch), method.penalty(state, batch)]
        results += [method.selection_price(state)]
        assert {r.dtype for r in results if r is not None} == {torch.float32}
        ranks = preference(method, state, routing)  # wider where equals are told apart
        assert ranks is None or ranks.dtype in (torch.float32, torch.float64)
        state = method.update(state, batch.sums)


@every_method_of_eight
def test_state_stays_float32_under_another_default_dtype(method):
    torch.set_default_dtype(torch.bfloat16)
    try:
        state = method.init(8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(state))


@every_method_of_eight
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_float64_logits_are_taken_and_an_update_keeps_the_dtype_of_the_state(method, state_dtype):
    routing = random_routing(24, 8, dtype=torch.float64)
    state = method.init(8) if state_dtype == torch.float32 else to_double(method.init(8))
    batch = one_batch(method, state, routing)
    gradient = method.penalty_gradient(state, batch)
    assert gradient is None or gradient.dtype == torch.float64
    assert all(t.dtype == state_dtype for t in tensors(method.update(state, batch.sums)))


@every_method_of_eight
@pytest.mark.parametrize("tokens", [0, 6], ids=["no-token", "all-padding"])
@every_gate
def test_batch_without_real_token_changes_no_state_and_has_zero_gradient(method, tokens, gate):
    state = skewed_state(method, 8)
    mask = torch.zeros(tokens, dtype=torch.bool)
    routing = plain_top_k(random_logits(tokens, 8), 2, gate=gate, mask=mask)
    batch = one_batch(method, state, routing)
    identical(method.update(state, batch.sums), state)
    gradient = method.penalty_gradient(state, batch)
    if gradient is not None:
        assert gradient.shape == (tokens, 8)
        assert not gradient.any()
        assert method.penalty(state, batch).item() == 0
    assert torch.isfinite(torch.cat([t.reshape(-1) for t in tensors(batch.sums)])).all()


@every_method_of_eight
@every_gate
def test_padding_changes_neither_sums_nor_term_nor_choice_of_real_tokens(method, gate):
    sequences, length, padding, num_experts = 3, 7, 4, 8
    state = to_double(skewed_state(method, num_experts, gate=gate))
    real = random_logits(sequences * length, num_experts, seed=5, dtype=torch.float64)
    # One sequence more is padding altogether.
    garbage = random_logits(
        (sequences + 1) * (length + padding), num_experts, seed=6, dtype=torch.float64
    )
    logits = 1e4 * garbage.view(sequences + 1, length + padding, num_experts)
    logits[:sequences, :length] = real.view(sequences, length, num_experts)
    mask = torch.zeros(sequences + 1, length + padding, dtype=torch.bool)
    mask[:sequences, :length] = True
    flat = mask.view(-1)

    short = plain_top_k(real, 2, gate=gate, sequences=sequences)
    long = plain_top_k(
        logits.view(-1, num_experts), 2, gate=gate, mask=flat, sequences=sequences + 1
    )
    expected, found = one_batch(method, state, short), one_batch(method, state, long)
    close(found.sums, expected.sums, 1e-12)
    close(method.update(state, found.sums), method.update(state, expected.sums), 1e-12)
    gradient = method.penalty_gradient(state, expected)
    if gradient is not None:
        padded_gradient = method.penalty_gradient(state, found)
        # A penalty of centred prices is a small difference of large terms: absolute.
        torch.testing.assert_close(
            method.penalty(state, found), method.penalty(state, expected), rtol=0, atol=1e-14
        )
        close(padded_gradient[flat], gradient, 1e-12)
        assert not padded_gradient[~flat].any()
    ranked = preference(method, state, short)
    if ranked is not None:
        close(preference(method, state, long)[flat], ranked, 1e-12)


# --- the methods as functions -----------------------------------------------------------------


@every_method
@given(seed=seeds, num_experts=st.sampled_from([3, 8]), padded=st.booleans())
@few
def test_renumbering_the_experts_renumbers_every_result(method, seed, num_experts, padded):
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed))
    new_number = order.argsort()
    routing = random_routing(18, num_experts, 2, seed=seed, padded=padded, sequences=3)
    renumbered = route(
        routing.logits[:, order],
        new_number[routing.experts],
        routing.gate,
        mask=routing.mask,
        sequences=3,
    )
    state = skewed_state(method, num_experts)
    other = permute(state, order)
    batch, twin = one_batch(method, state, routing), one_batch(method, other, renumbered)

    close(twin.sums, permute(batch.sums, order))
    after = permute(method.update(state, batch.sums), order)
    for mine, theirs in zip(tensors(after), tensors(method.update(other, twin.sums)), strict=True):
        # Squares of small differences, numbers that an adaptive rate keeps, double the rounding.
        adapts = getattr(method, "rate", None) == "auto" and not mine.dim()
        close(theirs, mine, 2e-5 if adapts else 1e-6)
    for mine, theirs in [
        (method.penalty(state, batch), method.penalty(other, twin)),
        (columns(method.loss_price(state, batch), order), method.loss_price(other, twin)),
        (
            columns(method.penalty_gradient(state, batch), order),
            method.penalty_gradient(other, twin),
        ),
        (columns(method.selection_price(state), order), method.selection_price(other)),
        (
            columns(preference(method, state, routing), order),
            preference(method, other, renumbered),
        ),
    ]:
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(theirs, mine, rtol=2e-6, atol=1e-6)


@every_method_of_eight
def test_functions_are_pure(method):
    routing = random_routing(24, 8, padded=True, sequences=4)
    state = skewed_state(method, 8)
    copies = [t.clone() for t in [*tensors(state), routing.logits, routing.scores, routing.experts]]

    def everything():
        batch = one_batch(method, state, routing, share=0.5)
        results = [method.update(state, batch.sums), batch.sums]
        results += [method.penalty(state, batch), method.penalty_gradient(state, batch)]
        results += [method.selection_price(state), preference(method, state, routing)]
        return [result for result in results if result is not None]

    identical(everything(), everything())
    identical([*tensors(state), routing.logits, routing.scores, routing.experts], copies)


@every_method_of_eight
def test_hyper_parameters_are_frozen_hashable_and_comparable(method):
    assert len({method, eval(repr(method), public_names())}) == 1
    for field in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, field.name, 1)


@every_method_of_eight
def test_repr_is_the_expression_that_builds_it(method):
    assert eval(repr(method), public_names()) == method


@every_method_of_eight
def test_levers_are_announced_truly(method):
    routing = random_routing(24, 8)
    state = skewed_state(method, 8)
    batch = one_batch(method, state, routing)
    assert method.traits.charges == (method.penalty_gradient(state, batch) is not None)
    assert method.traits.charges == (method.penalty(state, batch) is not None)
    assert method.traits.has_selection_price == (method.selection_price(state) is not None)
    assert method.traits.selects == (preference(method, state, routing) is not None)


@every_method_of_eight
@every_gate
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)
def test_logit_gradient_is_autograd_of_the_penalty(method, gate, padded, dtype, tolerance):
    state = skewed_state(method, 8, gate=gate)
    if dtype == torch.float64:
        state = to_double(state)
    routing = random_routing(24, 8, gate=gate, dtype=dtype, padded=padded, sequences=4, seed=3)
    # A step that holds another micro-batch as well.
    before = observe(method, state, random_routing(24, 8, gate=gate, dtype=dtype, seed=4))
    batch = one_batch(method, state, routing, share=0.4)
    batch = batch._replace(step=add(before, batch.sums))

    closed = method.penalty_gradient(state, batch)
    if closed is None:
        return
    logits = routing.logits.clone().requires_grad_()
    live = route(logits, routing.experts, gate, mask=routing.mask, sequences=4)
    method.penalty(state, batch._replace(routing=live)).backward()
    close(closed, logits.grad, tolerance)


def public_names() -> dict[str, object]:
    return {**vars(mb.potentials), **vars(mb.methods)}
