"""Megatron-Core on two ranks: every layout trains as one process does, and where its own does not.

All of it runs in one pair of processes; the tests read what they found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron_models import RELEASE, group_of_one
from megatron_ranks import (
    AUX,
    GLOBAL,
    ONE,
    PAIRS,
    PER_TOKEN,
    Gradients,
    gradients,
    our_bias,
    pipeline,
    stock_bias,
    work,
)
from torch import Tensor

from layouts import SAME_GRADIENT, SAME_STATE
from processes import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
]

Found = dict[Any, Any]


@pytest.fixture(scope="module")
def ranks() -> list[Found]:
    return run(work, 2, limit_s=280)


@pytest.fixture(scope="module")
def one() -> Iterator[None]:
    with group_of_one():
        yield


def assert_equal(found: Gradients, expected: Gradients, *, times: float = 1) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], times * gradient, rtol=1e-4, atol=1e-7)
    # φ charges nothing before it has seen a step.
    assert all(gradient.abs().max() > 1e-4 for gradient in expected[-1].values())


def memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "balance.state" in name}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.usefixtures("one")
def test_phi_trains_on_every_layout_as_on_one_process(ranks, layout, rank):
    found, state = ranks[rank][layout, "plain"]
    expected, expected_state = gradients(ONE)
    assert_equal(found, expected)
    assert len(memory(expected_state)) == 4
    for name, value in memory(expected_state).items():
        torch.testing.assert_close(memory(state)[name], value)


@pytest.mark.parametrize("layout", ["context", "tensor"])
@pytest.mark.usefixtures("one")
def test_padding_may_lie_unevenly_in_a_sequence_that_is_cut(ranks, layout):
    expected, expected_state = gradients(ONE, padded=True)
    for rank in (0, 1):
        found, state = ranks[rank][layout, "padded"]
        assert_equal(found, expected)
        for name, value in memory(expected_state).items():
            torch.testing.assert_close(memory(state)[name], value)


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.usefixtures("one")
def test_per_token_loss_weighs_every_real_token_alike_on_every_layout(ranks, layout):
    expected, _ = gradients(ONE, padded=True, **PER_TOKEN)
    for rank in (0, 1):
        assert_equal(ranks[rank][layout, "per token"][0], expected)


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.usefixtures("one")
def test_loss_free_is_megatrons_expert_bias_on_every_layout(ranks, layout):
    expected = stock_bias(ONE)
    assert expected
    for found in ranks:
        ours, theirs = found[layout, "bias"], found[layout, "stock bias"]
        for name, bias in expected.items():
            assert bias.any()
            assert torch.equal(theirs[name], bias)
            assert torch.equal(ours[name], bias)
            price = name.replace("expert_bias", "balance.state_price")
            assert torch.equal(ours[price], -bias)
    assert our_bias(ONE).keys() == ranks[0][layout, "bias"].keys()


@pytest.mark.parametrize("layers", [[0, 1], [1, 1]], ids=["dense first", "experts everywhere"])
@pytest.mark.usefixtures("one")
def test_a_pipeline_trains_as_one_process_also_with_a_dense_first_stage(ranks, layers, request):
    whole = pipeline(1, layers)
    stages = [found[request.node.callspec.id] for found in ranks]
    assert [len(stage.gradients[-1]) for stage in stages] == layers
    for step, expected in enumerate(whole.gradients):
        found = {name: g for stage in stages for name, g in stage.gradients[step].items()}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= SAME_GRADIENT * gradient.norm()
    state = {name: value for stage in stages for name, value in stage.state.items()}
    assert state.keys() == whole.state.keys()
    for name, value in whole.state.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=SAME_STATE)


def test_a_dense_pipeline_stage_steps_by_hand_without_waiting_for_the_others(ranks):
    assert [found["by hand"] for found in ranks] == [0, 2]


@pytest.mark.usefixtures("one")
def test_megatrons_global_aux_loss_halves_with_two_data_parallel_ranks(ranks):
    """Documents a fault of 0.16.1 to 0.19.2: its gradient is 1/DP of that on one process."""
    expected, _ = gradients(ONE, None, **GLOBAL)
    assert_equal(ranks[0]["stock global"][0], expected, times=0.5)


@pytest.mark.usefixtures("one")
def test_megatrons_aux_loss_per_token_halves_with_two_context_parallel_ranks_until_0_19(ranks):
    """Documents a fault: tokens are counted on one rank, the divisor on all of them."""
    expected, _ = gradients(ONE, None, **AUX, **PER_TOKEN)
    times = 0.5 if RELEASE < (0, 19) else 1
    assert_equal(ranks[0]["stock per token"][0], expected, times=times)
