"""Attaching to Transformers models: what would go wrong in silence is said once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moebalance as mb
from families import tiny, tokens
from moebalance.integrations.reminders import FORWARDS, UPDATES


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


class Bypassing(nn.Module):
    """A block that reads its router's weight and never calls it, as fused kernels do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        weights, experts = (flat @ self.gate.weight.T).softmax(-1).topk(2)
        return self.experts(flat, experts, weights).view_as(hidden)


def bypassed(layers: tuple[int, ...] = (0, 1)) -> nn.Module:
    model = tiny("mixtral")
    for layer in layers:
        model.model.layers[layer].mlp = Bypassing(model.model.layers[layer].mlp)
    return model


@pytest.mark.situation(
    "Silence",
    "A fused block computes past its router (MegaBlocks, ScatterMoE, MXFP4)",
    "warned: in training and in evaluation, once each",
)
def test_a_block_that_bypasses_its_router_is_told_of_in_evaluation_and_in_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = bypassed(), tokens()
    mb.attach(model, mb.PhiBalancing())
    for _ in range(2):
        model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids)
    evaluation, training = warnings_of(caplog)
    assert "in evaluation mode called none of the 2 routers" in evaluation
    assert "in training mode called none of the 2 routers" in training
    assert "MegaBlocks" in evaluation


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_is_said_of_a_model_whose_forward_is_compiled_after_attaching(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = tiny("mixtral", num_hidden_layers=1), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    model.forward = torch.compile(model.forward, backend="eager")
    for _ in range(2):  # the second runs what the first compiled
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()
        assert balancing.metrics()["tokens"] == ids.numel()
    assert warnings_of(caplog) == []


def test_a_monitor_of_one_bypassed_block_names_it(caplog: pytest.LogCaptureFixture) -> None:
    model = bypassed((1,)).eval()
    with mb.monitor(model) as watch:
        model(input_ids=tokens())
        assert watch.evaluate()["tokens"] == 24
        model(input_ids=tokens())
        watch.evaluate()
    (line,) = warnings_of(caplog)
    assert "model.layers.1.mlp.gate" in line


@pytest.mark.situation(
    "Silence",
    "A monitor whose model is not the one that runs",
    "warned: no router counted a token",
)
def test_a_monitor_whose_routers_were_never_called_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched, run = tiny("mixtral").eval(), tiny("mixtral").eval()
    with mb.monitor(watched) as watch:
        run(input_ids=tokens())
        assert watch.evaluate() == {}
        assert watch.evaluate() == {}
    (line,) = warnings_of(caplog)
    assert "counted no token" in line


@pytest.mark.situation(
    "Silence",
    "An MoE block without a router that is recognised, next to others",
    "warned: the block is named",
)
def test_an_moe_block_without_a_known_router_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("mixtral", num_hidden_layers=3)
    block = model.model.layers[2].mlp
    block.gate = nn.Linear(32, 8)  # no router: it has no top_k and returns logits alone
    balancing = mb.attach(model, mb.PhiBalancing())
    assert len(balancing.layers) == 2
    (line,) = warnings_of(caplog)
    assert "1 MoE blocks have no router" in line
    assert "model.layers.2.mlp" in line
    balancing.detach()
    caplog.clear()
    mb.attach(model, mb.PhiBalancing(), layers="model.layers.[01].*")  # said on purpose
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("fused", [True, False])  # a fused step leaves a weight's version alone
@pytest.mark.parametrize("forgotten", [True, False])
@pytest.mark.situation(
    "Silence",
    "`step()` is never called, or the callback is missing",
    "warned: after ten updates of the router",
)
def test_a_step_that_is_never_called_is_asked_for(
    caplog: pytest.LogCaptureFixture, forgotten: bool, fused: bool
) -> None:
    """As when a Trainer is not given the handle's callback."""
    model, ids = tiny("mixtral", num_hidden_layers=1), tokens(1, 4)
    balancing = mb.attach(model, mb.PhiBalancing())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    for _ in range(UPDATES + 3):
        for _ in range(2):  # accumulation
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if not forgotten:
            balancing.step()
    assert len(warnings_of(caplog)) == forgotten
    assert not forgotten or "BalanceCallback" in warnings_of(caplog)[0]


def test_steps_of_another_models_optimizer_are_not_this_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = tiny("mixtral", num_hidden_layers=1), tokens(1, 4)
    _balancing = mb.attach(model, mb.PhiBalancing())
    critic = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([critic], lr=1e-3)
    for _ in range(UPDATES + 3):
        model(input_ids=ids, labels=ids).loss.backward()
        critic.grad = torch.ones(3)
        optimizer.step()
    assert warnings_of(caplog) == []


def test_own_routers_without_a_step_are_told_of_too(caplog: pytest.LogCaptureFixture) -> None:
    router = mb.BalancedRouter(mb.LossFree(), num_experts=4, top_k=2)
    balancing = mb.attach(nn.Sequential(router))
    for _ in range(FORWARDS - 1):
        router(torch.zeros(2, 4, requires_grad=True))
    assert warnings_of(caplog) == []
    for _ in range(5):
        router(torch.zeros(2, 4, requires_grad=True))
    (line,) = warnings_of(caplog)
    assert "step() was not called" in line
    balancing.detach()


def test_all_tokens_counted_for_want_of_a_word_on_padding_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = tiny("mixtral"), tokens()
    model.config.pad_token_id = None
    mb.attach(model, mb.PhiBalancing())
    arguments: list[dict[str, Any]] = [
        {"attention_mask": torch.ones_like(ids)},
        {"labels": ids},
        {},
        {},
    ]
    said = [0, 0, 1, 1]
    for given, expected in zip(arguments, said, strict=True):
        model(input_ids=ids, **given)
        assert len(warnings_of(caplog)) == expected
    model(input_ids=ids[:1])  # a single row is padded by nobody
    assert "nothing says which tokens" in warnings_of(caplog)[0]
