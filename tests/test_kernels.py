"""The fused router: the programs, run by Triton's interpreter, against their plain form.

The interpreter must be chosen before Triton is imported, so the programs run in another process.
"""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebalance import GroupLimit, Sigmoid, Softmax, SqrtSoftplus
from moebalance.kernels import (
    choose,
    new_tickets,
    plain,
    pull_back,
    router,
    supported,
    tiling,
)

GATES = [Softmax(), Sigmoid()]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


# --- against the plain form -------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
@pytest.mark.parametrize("in_nats", [True, False], ids=["nats", "affinity"])
@pytest.mark.parametrize(
    ("experts", "top_k", "tokens"),
    [(2, 1, 3), (8, 2, 1), (60, 4, 19), (64, 8, 33), (96, 6, 7), (256, 8, 9), (320, 32, 3)],
)
def test_a_priced_batch_with_padding_is_that_of_the_plain_form(
    gate, normalize, in_nats, experts, top_k, tokens, interpreted
):
    how = {"normalize": normalize, "priced": True, "in_nats": in_nats, "padded": True}
    compare(interpreted, gate, experts, top_k, tokens, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_written_in_the_dtype_that_is_asked_for(dtype, interpreted):
    logits = rows(5, 16, torch.bfloat16)
    found = interpreted(choose, logits, Softmax(), 4, normalize=True, dtype=dtype)
    assert found.weights.dtype == dtype
    wanted = plain.choose(logits.double(), Softmax(), 4, normalize=True).weights
    close(found.weights, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("gate", "top_k", "dtype", "limit"),
    [
        (Softmax(), 32, torch.float32, None),
        (Sigmoid(), 3, torch.bfloat16, None),
        (Sigmoid(), 4, torch.float32, GroupLimit(9, 3)),
    ],
)
def test_the_widest_router_is_that_of_the_plain_form(gate, top_k, dtype, limit, interpreted):
    compare(interpreted, gate, tiling.MAX_EXPERTS, top_k, 2, dtype=dtype, limit=limit, priced=True)


@pytest.mark.parametrize("limit", [GroupLimit(1, 1), GroupLimit(4, 4)], ids=str)
def test_groups_that_are_all_kept_limit_nothing(limit, interpreted):
    logits = rows(5, 256)
    found = interpreted(choose, logits, Softmax(), 8, normalize=True, limit=limit)
    same_choice(found, plain.choose(logits, Softmax(), 8, normalize=True))


@settings(max_examples=60)
@given(st.data())
def test_any_batch_is_that_of_the_plain_form(interpreted, data):
    draw = data.draw
    experts = draw(st.sampled_from([8, 12, 60, 64, 96, 160]))
    limit, most = None, experts
    if draw(st.booleans()):
        count = draw(st.sampled_from([n for n in range(1, 9) if experts % n == 0]))
        size = experts // count
        kept, best = draw(st.integers(1, count)), draw(st.integers(1, min(3, size)))
        limit, most = GroupLimit(count, kept, best), kept * size
    compare(
        interpreted,
        draw(st.sampled_from(GATES)),
        experts,
        draw(st.integers(1, min(10, most))),
        draw(st.integers(0, 20)),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        limit=limit,
        normalize=draw(st.booleans()),
        priced=draw(st.booleans()),
        in_nats=draw(st.booleans()),
        charged=draw(st.booleans()),
        padded=draw(st.booleans()),
        beside=draw(st.integers(0, 5)),
        seed=draw(st.integers(0, 10)),
    )


def test_many_blocks_fall_to_few_programs(interpreted):
    logits = rows(33, 256)
    found = interpreted(choose_with_two_programs, logits)
    same_choice(found, plain.choose(logits, Softmax(), 8, normalize=True))


def test_the_last_program_adds_up_the_same_bits_whichever_it_is(interpreted):
    """Three groups of programs; between launches all counters are 0, whatever the memory held."""
    logits = rows(70, 16)
    found = [interpreted(choose_in_another_order, logits, seed) for seed in range(4)]
    for sums, counters in found:
        assert torch.equal(sums, found[0][0])
        assert not counters.any()
    wanted = plain.choose(logits, Softmax(), 4, normalize=True).packed
    close(found[0][0], wanted, 1e-5)
    assert torch.equal(found[0][0][16:], wanted[16:])


def compare(
    interpreted,
    gate,
    experts,
    top_k,
    tokens,
    *,
    dtype=torch.float32,
    limit=None,
    normalize=True,
    priced=False,
    in_nats=False,
    charged=True,
    padded=False,
    beside=0,
    seed=0,
):
    """Forward and backward against the plain form and its autograd, in float64."""
    logits = rows(tokens, experts + beside, dtype, seed)[:, :experts]
    price = (0.5 if in_nats else 0.01) * torch.randn(experts) if priced else None
    mask = torch.rand(tokens) < 0.7 if padded else None
    upstream = torch.randn(tokens, top_k).to(dtype)
    charge = torch.randn(experts) if charged else None
    how = {"normalize": normalize, "limit": limit, "mask": mask, "in_nats": priced and in_nats}
    found, gradient = interpreted(both, logits, gate, top_k, upstream, charge, price=price, **how)

    exact = logits.double().requires_grad_()
    price = None if price is None else price.double()
    wanted = plain.choose(exact, gate, top_k, price=price, **how)
    same_choice(found, wanted, dtype)
    total = (wanted.weights * upstream).sum()
    if charge is not None:
        total = total + (wanted.packed[:experts] * charge).sum()
    (expected,) = torch.autograd.grad(total, exact)
    assert gradient.dtype == dtype
    assert gradient.is_contiguous()
    close(gradient, expected, TOLERANCE[dtype])


def same_choice(found, wanted, dtype=torch.float32):
    assert torch.equal(found.experts, wanted.experts)
    assert found.weights.dtype == dtype
    close(found.weights, wanted.weights, TOLERANCE[dtype])
    close(found.normaliser, wanted.normaliser, 1e-5)
    close(found.packed, wanted.packed, 1e-5)
    size = found.packed.numel() // 2 - 1
    assert torch.equal(found.packed[size:], wanted.packed[size:].float())


# --- against the peers ------------------------------------------------------------------------


def test_two_best_of_a_group_is_deepseek_v3s_choice():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=64, num_local_experts=64, n_group=8, topk_group=3, num_experts_per_tok=6,
        norm_topk_prob=True, routed_scaling_factor=1.0,
    )  # fmt: skip
    peer = DeepseekV3TopkRouter(config)
    torch.nn.init.eye_(peer.weight)
    peer.e_score_correction_bias.normal_(std=0.1)
    same_as_peer(peer, Sigmoid(), -peer.e_score_correction_bias, GroupLimit(8, 3, best=2))


def test_the_best_of_a_group_is_deepseek_v2s_choice():
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    config = DeepseekV2Config(
        hidden_size=64, num_experts=64, n_group=8, topk_group=3, num_experts_per_tok=6,
        topk_method="group_limited_greedy", routed_scaling_factor=1.0,
    )  # fmt: skip
    peer = DeepseekV2TopkRouter(config)
    torch.nn.init.eye_(peer.weight)
    same_as_peer(peer, Softmax(), None, GroupLimit(8, 3, best=1))


def same_as_peer(peer, gate, price, limit):
    logits = rows(50, 64)
    _, weights, experts = peer(logits)
    normalize = isinstance(gate, Sigmoid)
    found = plain.choose(logits, gate, 6, normalize=normalize, price=price, limit=limit)
    dense = torch.zeros(50, 64)
    close(dense.scatter(1, found.experts, found.weights), dense.scatter(1, experts, weights), 1e-6)


# --- laws -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("limit", [None, GroupLimit(4, 2)], ids=str)
def test_of_equals_the_lowest_index_wins(gate, limit, interpreted):
    few = torch.randint(0, 3, (40, 32), generator=torch.Generator().manual_seed(0)).float()
    few[0] = torch.tensor([-0.0, 0.0]).repeat(16)
    found = interpreted(choose, few, gate, 5, normalize=True, limit=limit)
    assert found.experts[0].tolist() == [0, 1, 2, 3, 4]
    same_choice(found, plain.choose(few, gate, 5, normalize=True, limit=limit))


@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("limit", [None, GroupLimit(4, 2)], ids=str)
@pytest.mark.parametrize("price", [None, torch.zeros(16)], ids=["", "price"])
def test_what_is_not_finite_comes_through_and_breaks_nothing(gate, limit, price, interpreted):
    logits = rows(12, 16)
    clean = torch.ones(12, dtype=torch.bool)
    logits[3, 5] = -torch.tensor(torch.nan)  # its sign bit is set
    logits[4] = torch.nan
    logits[5, 2] = torch.inf
    logits[6] = -torch.inf
    logits[7, :15] = -torch.inf
    clean[3:8] = False
    how = {"normalize": True, "price": price, "limit": limit}
    found = interpreted(choose, logits, gate, 4, **how)
    assert ((found.experts >= 0) & (found.experts < 16)).all()
    assert (found.experts.sort(-1).values.diff(dim=-1) > 0).all()  # K different experts
    if isinstance(gate, Sigmoid) or (price is None and limit is None):
        assert found.experts[3, 0] == 5
    assert found.packed[:16].isnan().all()
    assert found.packed[16:32].sum() == 12 * 4
    whole = interpreted(choose, logits[clean], gate, 4, **how)
    assert torch.equal(found.experts[clean], whole.experts)
    masked = interpreted(choose, logits, gate, 4, mask=clean, **how)
    assert torch.equal(masked.packed, whole.packed)
    gradient = interpreted(
        pull_back, torch.ones(12, 4), logits, found.experts, found.normaliser, gate,
        normalize=True, charge=torch.ones(16), mask=clean,
    )  # fmt: skip
    unchosen = torch.ones(12, 16, dtype=torch.bool).scatter(1, found.experts, False)
    assert (gradient[~clean][unchosen[~clean]] == 0).all()
    assert gradient[clean].isfinite().all()


def test_extreme_logits_neither_overflow_nor_underflow(interpreted):
    for gate in GATES:
        for normalize in (True, False):
            for scale in (-300.0, 300.0):
                logits = rows(5, 16) + scale
                found = interpreted(choose, logits, gate, 3, normalize=normalize)
                wanted = plain.choose(logits, gate, 3, normalize=normalize)
                # The normaliser is near `scale`, and so are its rounding errors.
                close(found.weights, wanted.weights, 1e-4)
                close(found.packed, wanted.packed, 1e-4)


def test_the_same_batch_gives_the_same_bits(interpreted):
    logits, upstream, charge = rows(37, 60), torch.randn(37, 4), torch.randn(60)
    first, second = (
        interpreted(both, logits, Sigmoid(), 4, upstream, charge, normalize=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert torch.equal(first[1], second[1])


def test_the_order_of_tokens_and_of_experts_is_nothing_special(interpreted):
    logits = rows(21, 60)
    price = 0.1 * torch.randn(60)
    found = interpreted(choose, logits, Softmax(), 4, normalize=True, price=price)
    turn = torch.randperm(21)
    turned = interpreted(choose, logits[turn], Softmax(), 4, normalize=True, price=price)
    assert torch.equal(turned.experts, found.experts[turn])
    assert torch.equal(turned.weights, found.weights[turn])
    close(turned.packed, found.packed, 1e-6)
    swap = torch.randperm(60)
    swapped = interpreted(
        choose, logits[:, swap].contiguous(), Softmax(), 4, normalize=True, price=price[swap]
    )
    assert torch.equal(swap[swapped.experts], found.experts)
    close(swapped.packed[:60], found.packed[:60][swap], 1e-6)


# --- what it takes and refuses ----------------------------------------------------------------


def test_it_runs_on_an_interpreter_or_a_gpu(interpreted):
    assert interpreted(supported, rows(2, 8), Softmax(), 2)
    assert not supported(rows(2, 8), Softmax(), 2)


@pytest.mark.parametrize(
    ("logits", "gate", "top_k"),
    [
        (torch.zeros(4, 8, dtype=torch.float64), Softmax(), 2),
        (torch.zeros(4, 2305), Softmax(), 2),
        (torch.zeros(4, 64), Softmax(), 33),
        (torch.zeros(4, 8), Softmax(), 9),
        (torch.zeros(4, 8), SqrtSoftplus(), 2),
        (torch.zeros(8, 4).T, Softmax(), 2),
        (torch.zeros(2, 4, 8), Softmax(), 2),
    ],
)
def test_what_it_cannot_take_is_left_to_the_plain_form(logits, gate, top_k, interpreted):
    assert not interpreted(supported, logits, gate, top_k)


def test_more_experts_than_there_are_cannot_be_chosen():
    with pytest.raises(ValueError, match=r"top_k=9: must lie in 1\.\.8"):
        choose(rows(2, 8), Softmax(), 9, normalize=True)


@pytest.mark.parametrize(
    "limit",
    [GroupLimit(3, 1), GroupLimit(4, 5), GroupLimit(4, 1), GroupLimit(4, 0), GroupLimit(4, 2, 3)],
    ids=str,
)
def test_groups_that_do_not_fit_are_refused(limit):
    with pytest.raises(ValueError, match=re.escape(str(limit))):
        choose(rows(2, 8), Softmax(), 3, normalize=True, limit=limit)


# --- the other process -------------------------------------------------------------------------


def both(logits, gate, top_k, upstream, charge, *, normalize, mask=None, **how):
    """Forward and backward, in the other process."""
    found = choose(logits, gate, top_k, normalize=normalize, mask=mask, **how)
    gradient = pull_back(
        upstream, logits, found.experts, found.normaliser, gate,
        normalize=normalize, charge=charge, mask=mask,
    )  # fmt: skip
    return found, gradient


def choose_with_two_programs(logits):
    tile = router.tile
    router.tile = lambda *args, **kwargs: tile(*args, **kwargs)._replace(programs=2)
    try:
        return choose(logits, Softmax(), 8, normalize=True)
    finally:
        router.tile = tile


def choose_in_another_order(logits, seed):
    """Sums of a second launch of one row a program, in which the programs run in some order."""
    from triton.runtime.interpreter import interpreter_builder

    counters, start = new_tickets(logits), interpreter_builder.set_grid_idx
    tile, empty = router.tile, torch.Tensor.new_empty
    order = torch.randperm(70, generator=torch.Generator().manual_seed(seed)).tolist()

    def thin(*args, **kwargs):
        usual = tile(*args, **kwargs)
        return usual._replace(sizes=usual.sizes._replace(block=1))

    def dirty(self, *args, **kwargs):
        return empty(self, *args, **kwargs).fill_(77)

    def choose_once():
        return choose(logits, Softmax(), 4, normalize=True, tickets=counters).packed

    choose_once()
    with (
        mock.patch.object(router, "tile", thin),
        mock.patch.object(torch.Tensor, "new_empty", dirty),
        mock.patch.object(
            interpreter_builder, "set_grid_idx", lambda x, y, z: start(order[x], y, z)
        ),
    ):
        return choose_once(), counters


def rows(tokens, experts, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.randn(tokens, experts).to(dtype)


def close(found, wanted, tolerance):
    torch.testing.assert_close(
        found.double(), wanted.detach().double(), rtol=tolerance, atol=tolerance
    )
