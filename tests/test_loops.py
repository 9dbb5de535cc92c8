"""Loops written by hand: accelerate, gradient scalers, reduced precision, losses of one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import moebalance as mb
from families import tiny
from training import FixedPrice, Rows, agree, light_collections, padded

LENGTHS = [31, 4, 17, 9, 25, 5, 11, 40]


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


@pytest.fixture
def accelerator_of() -> Iterator[Callable[..., Accelerator]]:
    """Accelerators of several precisions in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **settings: Accelerator(cpu=True, **settings)
    AcceleratorState._reset_state(reset_partial_state=True)


def batches(data: Rows, split: int) -> list[dict[str, Tensor]]:
    size = len(data) // split
    rows = [data[row] for row in range(len(data))]
    return [padded(rows[first : first + size]) for first in range(0, len(rows), size)]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over a batch's labels."""
    return cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def gate(model: nn.Module) -> nn.Parameter:
    return model.model.layers[0].mlp.gate.weight


def term_of(step: Callable[[nn.Module, mb.Balancing], float | None]) -> Tensor:
    """Router gradient that `step` leaves with a term, less the one without; by what it returns."""
    found = []
    for strength in (1.0, 0.0):
        network = tiny("mixtral")
        balancing = mb.attach(network, FixedPrice(strength))
        factor = step(network, balancing) or 1.0
        found.append(gate(network).grad.float() / factor)
        balancing.step()
    return found[0] - found[1]


def plain_step(model: nn.Module, balancing: mb.Balancing) -> None:
    (batch,) = batches(Rows(8), 1)
    model(**batch).loss.backward()


def ragged_step(model: nn.Module, balancing: mb.Balancing) -> None:
    (batch,) = batches(Rows(8, LENGTHS), 1)
    model(**batch).loss.backward()


@pytest.mark.parametrize("own_loss", [False, True], ids=["model-loss", "own-loss"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_keeps_the_strength_under_accumulation(
    accelerator_of: Callable[..., Accelerator], own_loss: bool, precision: str
) -> None:
    def step(model: nn.Module, balancing: mb.Balancing) -> None:
        accelerator = accelerator_of(gradient_accumulation_steps=4, mixed_precision=precision)
        model, data = accelerator.prepare(model, DataLoader(Rows(8), 2))
        for batch in data:
            with accelerator.accumulate(model):
                if own_loss:
                    logits = model(input_ids=batch["input_ids"]).logits
                    loss = balancing.follow(mean_loss(logits, batch["labels"]))
                else:
                    loss = model(**batch).loss
                accelerator.backward(loss)
        assert accelerator.sync_gradients

    whole, parts = term_of(plain_step), term_of(step)
    assert agree(parts, whole, 1e-3 if precision == "no" else 2e-2)
    assert abs(parts.norm() / whole.norm() - 1) < 5e-3


def test_a_short_last_accumulation_weighs_in_the_term_what_it_weighs_in_the_loss(
    accelerator_of: Callable[..., Accelerator],
) -> None:
    """accelerate divides by the full number even there: 2 micro-batches of 4 are half a step."""

    def step(model: nn.Module, balancing: mb.Balancing) -> None:
        accelerator = accelerator_of(gradient_accumulation_steps=4)
        model, data = accelerator.prepare(model, DataLoader(Rows(4), 2))
        for batch in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
        assert accelerator.sync_gradients

    def whole(model: nn.Module, balancing: mb.Balancing) -> None:
        (batch,) = batches(Rows(4), 1)
        (model(**batch).loss / 2).backward()

    assert agree(term_of(step), term_of(whole))


@pytest.mark.parametrize("split", [2, 8])
def test_ragged_micro_batches_weigh_as_the_loop_weighs_their_losses(split: int) -> None:
    """By tokens here, which is exact: the term is then the mean over the tokens of the step."""

    def step(model: nn.Module, balancing: mb.Balancing) -> None:
        data = Rows(8, LENGTHS)
        for batch in batches(data, split):
            labels = batch.pop("labels")
            share = (labels != -100).sum() / sum(LENGTHS)
            loss = balancing.follow(mean_loss(model(**batch).logits, labels))
            (loss * share).backward()

    assert agree(term_of(step), term_of(ragged_step))


@pytest.mark.parametrize("own_loss", [False, True], ids=["model-loss", "own-loss"])
@pytest.mark.parametrize(
    ("autocast", "tolerance"), [(None, 1e-3), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)]
)
def test_a_gradient_scaler_scales_the_term_with_the_loss(
    own_loss: bool, autocast: torch.dtype | None, tolerance: float
) -> None:
    scaler_scale = 2.0**10

    def step(model: nn.Module, balancing: mb.Balancing) -> float:
        scaler = torch.amp.GradScaler("cpu", init_scale=scaler_scale)
        for batch in batches(Rows(8), 2):
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                output = model(**batch)
                loss = output.loss
                if own_loss:
                    loss = balancing.follow(mean_loss(output.logits.float(), batch["labels"]))
            scaler.scale(loss / 2).backward()
        return scaler_scale

    whole, parts = term_of(plain_step), term_of(step)
    assert agree(parts, whole, tolerance)
    assert abs(parts.norm() / whole.norm() - 1) < 5e-3


def test_a_step_skipped_by_the_scaler_is_given_up_with_discard() -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.PhiBalancing())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)  # the gradient overflows
    (batch,) = batches(Rows(8), 1)
    before, weight = balancing.state_dict(), gate(model).detach().clone()
    scaler.scale(model(**batch).loss * 1e3).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(gate(model), weight)
    balancing.discard()
    for name, layer in balancing.state_dict()["layers"].items():
        assert all(torch.equal(layer[key], before["layers"][name][key]) for key in layer)
    optimizer.zero_grad()
    model(**batch).loss.backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 8 * 12


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["keep", "recompute", "reentrant"])
@pytest.mark.parametrize("own_loss", [False, True], ids=["model-loss", "own-loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strength_and_counts_in_every_mode(
    reentrant: bool | None, own_loss: bool, dtype: torch.dtype
) -> None:
    def step(model: nn.Module, balancing: mb.Balancing) -> None:
        model.to(dtype)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        for batch in batches(Rows(8), 4):
            output = model(**batch)
            loss = output.loss
            if own_loss:
                loss = balancing.follow(mean_loss(output.logits.float(), batch["labels"]))
            (loss / 4).backward()
        counted = {layer.running[16].item() for layer in balancing.layers.values()}
        assert counted == {8 * 12}

    whole, parts = term_of(plain_step), term_of(step)
    assert agree(parts, whole, 1e-3 if dtype is torch.float32 else 2e-2)
    assert abs(parts.norm() / whole.norm() - 1) < 5e-3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_strength_is_the_same_compiled_with_a_loss_of_ones_own() -> None:
    found = []
    for strength, compiled in ((1.0, True), (1.0, False), (0.0, False)):
        model = tiny("mixtral", num_hidden_layers=1)
        balancing = mb.attach(model, FixedPrice(strength))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for batch in batches(Rows(8), 2):
            loss = balancing.follow(mean_loss(run(batch["input_ids"]).logits, batch["labels"]))
            (loss / 2).backward()
        found.append(gate(model).grad)
        balancing.step()
    compiled, eager, without = found
    assert agree(compiled - without, eager - without)
