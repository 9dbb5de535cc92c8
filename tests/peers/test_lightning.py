"""Lightning: what the balancing term weighs, and which steps and tokens count, in its Trainer."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from lightning_models import (
    ByHand,
    FixedPrice,
    KeepGradient,
    Plain,
    Unrounded,
    fitted,
    same,
    trainer,
)
from torch import Tensor

import moebalance as mb
from moebalance.integrations.lightning import BalanceCallback, _unshare

pytestmark = [
    # Lightning on a torch newer than itself, and its advice on data loading.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def term_gradients(kind: type[Plain] = Plain, *, options: Any = None, **settings: Any) -> Tensor:
    """Router gradient of each step with a balancing term, less the one without."""
    found = []
    for strength in (1.0, 0.0):
        keep = KeepGradient()
        module = kind(FixedPrice(strength), rows=8, **(options or {}))
        # No update between the steps that are compared.
        module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.0)
        fitted(module, keep, **settings)
        found.append(torch.stack(keep.gradients))
    return found[0] - found[1]


def agrees(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> bool:
    return bool(expected.norm() > 0 and (found - expected).norm() < tolerance * expected.norm())


# The term


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_strength_means_the_same_however_a_step_is_split(accumulation: int, scaled: bool) -> None:
    whole = term_gradients(options={"batch": 8})
    split = term_gradients(
        options={"batch": 8 // accumulation},
        accumulate_grad_batches=accumulation,
        **({"plugins": Unrounded()} if scaled else {}),
    )
    assert split.shape == whole.shape
    assert agrees(split, whole)


def test_a_last_step_of_fewer_batches_is_scaled_as_its_loss_is() -> None:
    """Lightning divides the loss of three rows in the second step by four all the same."""
    rows = term_gradients(options={"batch": 1})
    steps = term_gradients(options={"batch": 1}, accumulate_grad_batches=5)
    assert len(steps) == 2
    assert agrees(steps[0], rows[:5].sum(0) / 5)
    assert agrees(steps[1], rows[5:].sum(0) / 5)


def test_clipping_scales_the_term_with_the_loss() -> None:
    clipped, keep = [], KeepGradient()
    module = Plain(FixedPrice(100.0))
    module.on_train_batch_end = lambda *_: clipped.append(
        torch.cat([p.grad.flatten().clone() for p in module.parameters()])
    )
    fitted(module, keep, gradient_clip_val=0.1)
    for before, after in zip(keep.gradients, clipped, strict=True):
        assert after.norm() == pytest.approx(0.1, rel=1e-4)
        router = after[: before.numel()].view_as(before)
        assert agrees(router / router.norm(), before / before.norm())


# Steps and tokens


def test_a_balancing_step_ends_with_each_optimizer_step_and_its_tokens_count_once() -> None:
    module = Plain(rows=12)
    found = fitted(
        module,
        accumulate_grad_batches=2,
        max_epochs=2,
        limit_val_batches=2,
        num_sanity_val_steps=2,
        val_check_interval=1,
    )
    assert found.steps == module.trainer.global_step == 6
    assert found.metrics()["tokens"] == 2 * 2 * 5


def test_a_step_that_the_gradient_scaler_skips_is_a_step_of_its_own() -> None:
    class Overflows(Plain):
        def on_after_backward(self) -> None:
            if self.global_step == 0:
                self.model.gate.grad.fill_(torch.inf)

    seen = []
    module = Overflows(rows=6)
    before = module.model.gate.detach().clone()
    module.on_train_batch_end = lambda *_: seen.append(
        (module.balancing.steps, torch.equal(module.model.gate, before))
    )
    found = fitted(module, plugins=Unrounded())
    assert seen == [(1, True), (2, False), (3, False)]
    assert found.metrics()["tokens"] == 2 * 5


def test_a_batch_that_the_module_skips_is_no_step() -> None:
    class Skips(Plain):
        def training_step(self, x: Tensor, index: int) -> Tensor | None:
            return None if index == 1 else super().training_step(x, index)

    module = Skips(rows=6)
    with pytest.warns(UserWarning, match="returned `None`"):
        found = fitted(module)
    assert (found.steps, module.trainer.global_step) == (2, 3)


def test_an_optimizer_that_asks_twice_for_the_gradients_is_refused() -> None:
    module = Plain()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(RuntimeError, match="LBFGS evaluates its closure more than once"):
        fitted(module)


# Optimization by hand


def test_a_step_by_hand_is_scaled_as_its_followed_loss_is() -> None:
    whole = term_gradients(options={"batch": 8})
    for settings in ({}, {"plugins": Unrounded()}):
        split = term_gradients(ByHand, options={"batch": 8, "parts": 4}, **settings)
        # The hook sees gradients after unscaling, as for any trainer.
        assert agrees(split, whole)


def test_each_of_several_steps_on_one_batch_by_hand_is_a_step() -> None:
    found = fitted(ByHand(times=3, parts=2))
    assert found.steps == 2 * 3
    assert found.metrics()["tokens"] == 2 * 5


def test_steps_by_hand_that_the_scaler_skips_are_steps_too() -> None:
    class Overflows(ByHand):
        def on_after_backward(self) -> None:
            if self.global_step < 2:
                self.model.gate.grad.fill_(torch.inf)

    found = fitted(Overflows(rows=2, times=3), plugins=Unrounded())
    assert found.steps == 3
    assert found.metrics()["tokens"] == 2 * 5


class OwnBackward(Plain):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (3 * loss).backward()


@pytest.mark.parametrize("make", [partial(ByHand, follows=False), OwnBackward])
def test_a_loss_that_the_module_scales_out_of_sight_must_be_followed(make: Any) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match=r"write loss = balancing\.follow\(loss\) before"):
        fitted(module)
    assert same(module.state_dict(), before)
    # Nothing to scale, so nothing to ask for; and the refusal leaves nothing behind.
    free = make(mb.LossFree())
    assert fitted(free).steps == 2
    assert module.model.router.loss_scale == 1


def test_a_step_of_another_optimizer_is_not_a_balancing_step() -> None:
    class Two(ByHand):
        def __init__(self) -> None:
            super().__init__()
            self.other = torch.nn.Linear(6, 1)

        def configure_optimizers(self) -> Any:
            own = torch.optim.SGD(self.other.parameters(), lr=0.1)
            return own, torch.optim.SGD(self.model.parameters(), lr=0.1)

        def training_step(self, x: Tensor, index: int) -> None:
            other, own = self.optimizers()
            self.manual_backward(self.other(x).mean())
            other.step()
            self.manual_backward(self.balancing.follow(self.model(x).mean()))
            own.step()

    module = Two()
    with pytest.raises(ValueError, match=r"optimizer=None\) with 2 optimizers \(SGD, SGD\)"):
        fitted(module)
    with pytest.raises(ValueError, match=r"optimizer=2\) with 2 optimizers"):
        trainer([BalanceCallback(module.balancing, optimizer=2)]).fit(module)
    trainer([BalanceCallback(module.balancing, optimizer=1)]).fit(module)
    assert (module.balancing.steps, module.trainer.global_step) == (2, 4)
    assert module.balancing.metrics()["tokens"] == 2 * 5


def test_a_spawned_process_shares_no_tensor_of_the_balancing() -> None:
    layers = {name: mb.BalancedRouter(mb.recommended(), 4, 2) for name in "ab"}
    balancing = mb.attach(torch.nn.ModuleDict(layers))
    for router in layers.values():
        router.remake(torch.Tensor.share_memory_)
        router.share_memory()
    balancing.share_cells()
    _unshare(balancing)
    for router in layers.values():
        cells = [router.running, router.loss_scale, router.replayed, router.tickets]
        assert not any(cell.is_shared() for cell in (*cells, *router.buffers()))
    assert layers["a"].replayed is layers["b"].replayed
