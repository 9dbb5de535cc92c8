"""Copies of a balanced model: references, averages, and what is trained on its own."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

import moebalance as mb
from families import loss, tiny, tokens
from named_models import WIDTH, Layer, Model
from training import BalanceCallback, FixedPrice, KeepGradient, Rows, agree, plain

BOTH = mb.Together(mb.PhiBalancing(strength=0.5), mb.LossFree(speed=0.3))
"""A term and a price: of qwen3_moe the handle holds it, of deepseek_v3 the model's own bias."""

each_holder = pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])


def train(model: nn.Module, balancing: mb.Balancing | None, steps: int = 3, seed: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(seed, seed + steps):
        loss(model, tokens(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if balancing is not None:
            balancing.step()


def balanced(family: str, method: mb.Method = BOTH) -> tuple[Any, mb.Balancing]:
    """A model in mid-training, whose price is not zero."""
    model = tiny(family)
    balancing = mb.attach(model, method)
    train(model, balancing)
    return model, balancing


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    model.eval()
    found: Tensor = model(input_ids=tokens(seed=99)).logits
    model.train()
    return found


def router_gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss(model, tokens(seed=7)).backward()
    return [p.grad.clone() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]


def state(balancing: mb.Balancing) -> list[Tensor]:
    """All that is kept of the layers, between steps too."""
    layers = list(balancing.layers.values())
    return [tensor.clone() for x in layers for tensor in (*x.buffers(), x.running, x.loss_scale)]


@pytest.mark.situation(
    "Copies",
    "`copy.deepcopy(model)` of a balanced model",
    "works: the copy routes alike, and the original's state does not hear of it",
)
@each_holder
def test_a_copy_routes_alike_and_counts_nowhere(family: str) -> None:
    model, balancing = balanced(family)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    before = state(balancing)
    train(twin, None, steps=2)
    assert all(map(torch.equal, state(balancing), before))
    train(model, balancing, steps=1)
    assert balancing.metrics()["tokens"] == 24


@pytest.mark.situation(
    "Copies",
    "A copy is trained, and nobody attached to it",
    "warned: it is neither counted nor charged",
)
def test_a_copy_that_is_trained_is_not_charged_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, balancing = balanced("qwen3_moe", mb.PhiBalancing(strength=0.5))
    charged, twin = router_gradients(model), copy.deepcopy(model)
    balancing.detach()
    free = router_gradients(model)
    for _ in range(2):
        for mine, without, with_term in zip(router_gradients(twin), free, charged, strict=True):
            assert torch.equal(mine, without)
            assert not torch.allclose(mine, with_term, rtol=1e-3)
    assert caplog.text.count("a copy of a balanced model is trained") == 1


@pytest.mark.situation(
    "Copies",
    "A copy as the reference of DPO",
    "works: the price stays what it was when the model was copied",
)
@each_holder
def test_a_reference_keeps_its_price_while_the_policy_trains(family: str) -> None:
    model, balancing = balanced(family)
    reference = copy.deepcopy(model).requires_grad_(False)
    before = logits(reference)
    train(model, balancing, steps=4, seed=20)
    assert torch.equal(logits(reference), before)
    assert not torch.allclose(logits(model), before)
    balancing.detach()
    assert torch.equal(logits(reference), before)


def by_hand(average: nn.Module, model: nn.Module) -> None:
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.data.mul_(0.5).add_(theirs.data, alpha=0.5)
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.data.copy_(theirs)


@pytest.mark.situation(
    "Copies",
    "`AveragedModel` with `use_buffers` True or False, or an average by hand",
    "works: averaged weights are evaluated under the price in force, or their own averaged bias",
)
@each_holder
@pytest.mark.parametrize("how", ["copied buffers", "averaged buffers", "by hand"])
def test_averaged_weights_are_evaluated_under_the_price_in_force(family: str, how: str) -> None:
    model, balancing = balanced(family)
    if how == "by hand":
        average = copy.deepcopy(model)
    else:
        rule = get_ema_multi_avg_fn(0.5)
        average = AveragedModel(model, multi_avg_fn=rule, use_buffers=how == "averaged buffers")
    for seed in (20, 21):
        train(model, balancing, steps=1, seed=seed)
        by_hand(average, model) if how == "by hand" else average.update_parameters(model)
    # The same weights in a model of its own, which is told the price.
    plain = tiny(family)
    plain.load_state_dict(getattr(average, "module", average).state_dict())
    there = mb.attach(plain, BOTH)
    if family == "qwen3_moe":
        unpriced = logits(plain)
        there.load_state_dict(balancing.state_dict())
        assert not torch.equal(logits(plain), unpriced)
    assert torch.equal(logits(average), logits(plain))
    assert not torch.equal(logits(average), logits(model))


@pytest.mark.situation(
    "Copies", "`attach` to a copy", "works: it is counted and charged once, by its own handle"
)
@each_holder
def test_a_copy_that_is_attached_to_is_charged_once(family: str) -> None:
    model, balancing = balanced(family, FixedPrice(1.0))
    twin = copy.deepcopy(model)
    own = mb.attach(twin, FixedPrice(1.0))
    before = state(balancing)
    once = router_gradients(twin)
    own.step()
    assert own.metrics()["tokens"] == 24
    assert all(map(torch.equal, state(balancing), before))
    for mine, theirs in zip(once, router_gradients(model), strict=True):
        torch.testing.assert_close(mine, theirs)
    own.detach()
    balancing.detach()
    for mine, theirs in zip(router_gradients(twin), router_gradients(model), strict=True):
        assert torch.equal(mine, theirs)


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_holder
def test_a_pickled_model_routes_alike_and_is_charged_once_it_is_attached_to(family: str) -> None:
    model, _ = balanced(family)
    assert torch.equal(logits(pickled(model)), logits(model))
    model, balancing = balanced(family, FixedPrice(1.0))
    loaded, charged = pickled(model), router_gradients(model)
    balancing.detach()
    for mine, free in zip(router_gradients(loaded), router_gradients(model), strict=True):
        torch.testing.assert_close(mine, free)
    own = mb.attach(loaded, FixedPrice(1.0))
    for mine, theirs in zip(router_gradients(loaded), charged, strict=True):
        torch.testing.assert_close(mine, theirs)
    own.step()
    assert own.metrics()["tokens"] == 24


def test_a_copy_takes_its_hooks_off_when_it_is_attached_to() -> None:
    model, _ = balanced("qwen3_moe")
    twin, bare = copy.deepcopy(model), tiny("qwen3_moe")
    mb.attach(twin, BOTH).detach()

    def places(model: nn.Module) -> list[int]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
        found = [sum(len(getattr(m, kind)) for m in model.modules()) for kind in kinds]
        return [*found, sum("forward" in vars(m) for m in model.modules())]

    assert places(twin) == places(bare)
    assert places(model) != places(bare)


def test_what_cannot_be_copied_stays_with_the_original() -> None:
    """A process group, for example."""
    model = tiny("qwen3_moe")
    balancing = mb.attach(model, BOTH)
    balancing._ledger.group = threading.Lock()  # type: ignore[assignment]
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


class Average(TrainerCallback):
    """An exponential average, as people write it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average = AveragedModel(kwargs["model"], multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update_parameters(kwargs["model"])


@pytest.mark.situation(
    "Copies", "A Trainer callback that keeps an average of the weights", "works: as `AveragedModel`"
)
@each_holder
def test_an_average_kept_by_a_callback_changes_nothing_in_the_training(
    family: str, tmp_path: Path
) -> None:
    found = []
    for extra in ([], [Average()]):
        balance = BalanceCallback(BOTH)
        make = plain(tmp_path, Rows(8), max_steps=3, learning_rate=1e-2)
        model = tiny(family)
        make(model, [balance, *extra]).train()
        found.append((logits(model), state(balance.balancing)))
    (without, state_without), (with_it, state_with) = found
    assert torch.equal(with_it, without)
    assert all(map(torch.equal, state_with, state_without))
    average = extra[0].average
    twin = tiny(family)
    twin.load_state_dict(average.module.state_dict())
    there = mb.attach(twin, BOTH)
    if family == "qwen3_moe":
        there.load_state_dict(balance.balancing.state_dict())
    assert torch.equal(logits(average), logits(twin))


@pytest.mark.situation(
    "Copies", "A Trainer trains a copy of a balanced model", "works: the callback attaches to it"
)
def test_a_trainer_trains_a_copy_as_it_trains_the_model(tmp_path: Path) -> None:
    model, balancing = balanced("qwen3_moe", FixedPrice(1.0))
    twin, gradients = copy.deepcopy(model), []
    balancing.detach()
    for each in (model, twin):
        keep = KeepGradient()
        plain(tmp_path, Rows(8))(each, [BalanceCallback(FixedPrice(1.0)), keep]).train()
        gradients.append(keep.gradient)
    assert agree(gradients[1], gradients[0], tolerance=1e-6)


class Own(Layer):
    """Logits of a method, or of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w_gating = nn.Parameter(self.gate.weight.detach().T.clone())

    def get_logits(self, x: Tensor) -> Tensor:
        return x @ self.w_gating

    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return super().weigh(logits)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.weigh(self.get_logits(flat))
        out = torch.stack([expert(flat) for expert in self.experts], dim=1)
        return (out.gather(1, chosen[..., None].expand(-1, -1, WIDTH)) * weights[..., None]).sum(1)


@pytest.mark.situation(
    "Copies",
    "A copy of a hand-written model whose routers are named to `attach`",
    "works: the same, for a module, a method and a parameter",
)
@pytest.mark.parametrize("routers", ["*.gate", "*.get_logits", "*.w_gating"])
def test_a_copy_of_a_named_model_is_its_own(routers: str) -> None:
    torch.manual_seed(0)
    model = Model(Layer() if routers == "*.gate" else Own())
    weight = model.layers[0].gate.weight if routers == "*.gate" else model.layers[0].w_gating
    told: dict[str, Any] = {"routers": routers, "top_k": 2, "normalize": True, "num_experts": 8}
    x = torch.randn(64, WIDTH)

    def gradient(model: nn.Module) -> Tensor:
        model.zero_grad()
        model(x).square().mean().backward()
        own = model.layers[0].gate.weight if routers == "*.gate" else model.layers[0].w_gating
        return own.grad.clone()

    free = gradient(model)
    balancing = mb.attach(model, FixedPrice(1.0), **told)
    charged = gradient(model)
    balancing.step()
    assert not torch.allclose(charged, free)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(gradient(twin), free)
    assert not any(layer.running.any() for layer in balancing.layers.values())
    nn.init.zeros_(weight)
    torch.testing.assert_close(gradient(twin), free)
    own = mb.attach(twin, FixedPrice(1.0), **told)
    torch.testing.assert_close(gradient(twin), charged)
    own.step()
    assert own.metrics()["tokens"] == 64


def test_averaged_weights_of_a_named_model_are_evaluated_under_the_price_in_force() -> None:
    torch.manual_seed(0)
    model, x = Model(Layer()), torch.randn(64, WIDTH)
    told: dict[str, Any] = {"routers": "*.gate", "top_k": 2, "normalize": True}
    balancing = mb.attach(model, mb.LossFree(speed=0.5), **told)
    twin = copy.deepcopy(model).eval()
    before = twin(x)
    model(x).square().mean().backward()
    balancing.step()
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        model.layers[0].gate.weight.mul_(1.5)
        by_hand(twin, model)
    plain = Model(Layer()).eval()
    plain.load_state_dict(twin.state_dict())
    there = mb.attach(plain, mb.LossFree(speed=0.5), **told)
    there.load_state_dict(balancing.state_dict())
    assert torch.equal(twin(x), plain(x))
