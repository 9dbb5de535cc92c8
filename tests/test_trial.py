"""On a GPU the fused kernels are tried before a batch is left to them."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import commit
from moebalance import BalancedRouter, PhiBalancing, Sigmoid, Softmax
from moebalance.core import layer, trial
from moebalance.core.trial import agree
from moebalance.kernels import price, router

CPU = torch.device("cpu")
CASES = [(Softmax(), 8, 2, torch.float32), (Sigmoid(), 60, 4, torch.bfloat16)]


@pytest.mark.parametrize(("gate", "experts", "top_k", "dtype"), CASES, ids=str)
def test_kernels_as_they_are_agree_with_torch(gate, experts, top_k, dtype, interpreted):
    assert interpreted(said, None, gate, experts, top_k, dtype) == (True, "")


@pytest.mark.survives(
    "Numbers",
    "A fused kernel is compiled wrongly on a GPU, or not at all",
    "goes on: torch does its work, with a warning that says what differs",
)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("weights", "weights of a router"),
        ("sums", "sums of a router"),
        ("gradient", "gradient of a router"),
        ("counters", "sums of a router"),
        ("price", "gradient of an attached router"),
        ("compiler", "RuntimeError: no C compiler"),
    ],
)
def test_what_differs_is_named_and_torch_goes_on_alone(fault, words, interpreted):
    found, message = interpreted(said, fault, Softmax(), 8, 2, torch.float32)
    assert not found
    assert words in message
    assert "Torch does their work" in message


def test_a_layer_leaves_nothing_to_kernels_that_differ(monkeypatch):
    logits, made = torch.randn(6, 8), BalancedRouter(PhiBalancing(), 8, 2)
    assert made.pass_for(logits, 2).fused
    monkeypatch.setattr(layer, "trusted", lambda *_: False)
    assert not made.pass_for(logits, 2).fused


@pytest.mark.parametrize("capturing", [False, True], ids=["", "in a graph's capture"])
@pytest.mark.parametrize("answer", [False, True])
def test_on_a_gpu_the_trial_decides_but_not_while_a_graph_is_captured(
    capturing, answer, monkeypatch
):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(trial, "agree", lambda *kind: asked.append(kind) or answer)
    device = torch.device("cuda", 1)
    logits = SimpleNamespace(device=device, dtype=torch.bfloat16, shape=torch.Size([6, 8]))
    assert trial.trusted(logits, Softmax(), 2) is (capturing or answer)
    assert asked == [] if capturing else asked == [(device, torch.bfloat16, Softmax(), 8, 2)]


def test_fake_tensors_are_not_tried(monkeypatch):
    monkeypatch.setattr(trial, "agree", None)  # a call would fail
    with FakeTensorMode():
        assert trial.trusted(torch.empty(6, 8, device="cuda"), Softmax(), 2)


def test_nothing_is_tried_where_no_kernel_runs(monkeypatch):
    monkeypatch.setattr(trial, "agree", None)  # a call would fail
    made = BalancedRouter(PhiBalancing(), 8, 2)
    made(torch.randn(6, 8, requires_grad=True))[0].sum().backward()
    commit(made)


def said(fault, gate, experts, top_k, dtype):
    """Whether the kernels pass, and the warning, with a fault planted in them."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    trial.logger.addHandler(handler)
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        plant(fault, patch)
        agree.cache_clear()
        found = agree(CPU, dtype, gate, experts, top_k, 70)
        assert agree(CPU, dtype, gate, experts, top_k, 70) == found
    trial.logger.removeHandler(handler)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(records) == (not found)  # once
    return found, "".join(records)


def plant(fault, patch):
    choose, pull_back, terms = router.choose, router.pull_back, price.terms
    kernels = trial.kernels

    def chosen(*args, **options):
        found = choose(*args, **options)
        if fault == "weights":
            found.weights[:, 0] *= 1.5
        if fault == "sums":
            found.packed[3] += 9
        if fault == "counters":
            options["tickets"][0] += 1
        return found

    def pulled(*args, **options):
        return pull_back(*args, **options) * (1.2 if fault == "gradient" else 1)

    def formed(charge, logits):
        found = terms(charge, logits)
        return found._replace(numbers=(2 * found.numbers[0], found.numbers[1]))

    def broken(*_, **__):
        raise RuntimeError("no C compiler")

    patch.setattr(kernels, "choose", broken if fault == "compiler" else chosen)
    patch.setattr(kernels, "pull_back", pulled)
    if fault == "price":
        from moebalance.kernels import attached

        patch.setattr(attached, "terms", formed)
