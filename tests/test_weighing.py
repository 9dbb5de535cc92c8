"""How much of the router's gradient is balancing, against a backward of each part alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moebalance as mb
from families import tiny, tokens
from tiny_moe import EXPERTS, PHI, ROUTERS, WIDTH, TinyMoE

STRONG = mb.PhiBalancing(strength=0.5)


def logits_and_x(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, EXPERTS, generator=generator), torch.randn(32, 2, generator=generator)


def gradient(router: torch.nn.Module, seed: int, scale: float) -> torch.Tensor:
    """Of a loss on the weights that are scaled; the balancing's own part is not."""
    logits, target = logits_and_x(seed)
    logits.requires_grad_()
    weights, _ = router(logits)
    (scale * (weights * target).sum()).backward()
    assert logits.grad is not None
    return logits.grad


@pytest.mark.parametrize("method", [STRONG, mb.SwitchLoss(strength=0.3), mb.LossFree()], ids=repr)
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "top-k-then-softmax"])
def test_it_is_the_quotient_of_the_two_gradients(name, method):
    router = ROUTERS[name](method)
    balance = gradient(router, 1, scale=0.0)  # the task sends exact zeros
    task = gradient(ROUTERS[name](mb.NoBalancing()), 1, scale=1.0)
    router = ROUTERS[name](method)
    balancing = mb.attach(router)
    balancing.weigh_gradient()
    gradient(router, 1, scale=1.0)
    balancing.step()
    found = balancing.metrics()
    expected = (balance.norm() / task.norm()).item()
    assert found["gradient_ratio"] == pytest.approx(expected, rel=1e-4)
    assert (found["gradient_ratio"] > 0) == method.traits.charges


def test_all_batches_of_a_step_count_and_those_of_the_last_step_do_not():
    router = mb.BalancedRouter(STRONG, EXPERTS, 2)
    balancing = mb.attach(router)
    balancing.weigh_gradient()
    gradient(router, 5, scale=100.0)
    balancing.step()
    first = balancing.metrics()["gradient_ratio"]
    for seed in (6, 7):
        gradient(router, seed, scale=1.0)
    cell = router.weighing
    assert cell is not None
    assert len(cell._running) == 2
    balancing.step()
    assert balancing.metrics()["gradient_ratio"] > 10 * first
    assert not cell._running


def test_it_is_off_at_first_and_can_be_switched_off_again():
    router = mb.BalancedRouter(STRONG, EXPERTS, 2)
    balancing = mb.attach(router)
    for on, present in ((None, False), (True, True), (False, False)):
        if on is not None:
            balancing.weigh_gradient(on)
        gradient(router, 1, scale=1.0)
        balancing.step()
        assert ("gradient_ratio" in balancing.metrics()) == present


def test_the_gradient_that_trains_is_the_same_with_it():
    plain, weighed = (mb.BalancedRouter(STRONG, EXPERTS, 2) for _ in range(2))
    mb.attach(weighed).weigh_gradient()
    torch.testing.assert_close(gradient(plain, 3, 1.0), gradient(weighed, 3, 1.0))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    found = []
    for recompute in (False, True):
        model = TinyMoE(PHI)
        balancing = mb.attach(model)
        balancing.weigh_gradient()
        x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.square().mean().backward()
        balancing.step()
        found.append(balancing.metrics()["gradient_ratio"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0] > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_transformers_model_has_it_and_it_grows_with_the_strength(family):
    found = []
    for strength in (0.01, 0.02):
        model, ids = tiny(family).train(), tokens()
        balancing = mb.attach(model, mb.SwitchLoss(strength=strength))
        balancing.weigh_gradient()
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()
        found.append(balancing.metrics())
    assert found[1]["gradient_ratio"] == pytest.approx(2 * found[0]["gradient_ratio"], rel=1e-3)
    assert found[0]["gradient_ratio_worst"] >= found[0]["gradient_ratio"]


def test_a_task_that_sends_no_gradient_is_said_and_not_divided_by(caplog):
    router = mb.BalancedRouter(STRONG, EXPERTS, 2)
    balancing = mb.attach(router)
    balancing.weigh_gradient()
    gradient(router, 1, scale=0.0)
    balancing.step()
    assert "gradient_ratio" not in balancing.metrics()
    assert "no task gradient" in caplog.text


def test_under_a_compiler_it_is_refused_with_what_to_do(monkeypatch):
    router = mb.BalancedRouter(STRONG, EXPERTS, 2)
    mb.attach(router).weigh_gradient()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(RuntimeError, match="eager mode"):
        gradient(router, 1, scale=1.0)
