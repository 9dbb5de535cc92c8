"""A Trainer's checkpoints and the balancing state: resumable however the run went."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer

import moebalance as mb
from families import tiny
from training import BalanceCallback, Rows, arguments, light_collections, padded

SAVING = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


class Whole(Trainer):
    """Loads all weights of its best checkpoint, experts too."""

    def _load_best_model(self) -> None:
        fresh = AutoModelForCausalLM.from_pretrained(self.state.best_model_checkpoint)
        self.model.load_state_dict(fresh.state_dict())


def trainer_of(folder: Path, model: Any, callback: Any, kind: Any = Trainer, **more: Any) -> Any:
    settings = arguments(folder, **{**SAVING, **more})
    return kind(
        model,
        settings,
        train_dataset=Rows(16),
        eval_dataset=Rows(8),
        data_collator=padded,
        callbacks=[callback],
    )


def price_of(balancing: Any) -> Tensor:
    return torch.stack([layer.price for layer in balancing.layers.values()])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"], ids=["hook", "bias"])
@pytest.mark.situation(
    "Checkpoints",
    "`load_best_model_at_end`",
    "works: the state and its price go back to the best checkpoint",
)
def test_the_best_checkpoint_is_evaluated_with_its_own_price(tmp_path: Path, family: str) -> None:
    callback = BalanceCallback(mb.LossFree(speed=0.2))
    trainer = trainer_of(
        tmp_path,
        tiny(family),
        callback,
        Whole,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first, as the loss falls
    )
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith("-6")
    again = trainer.evaluate()["eval_loss"]
    assert again == pytest.approx(trainer.state.best_metric, abs=1e-6)
    assert callback.balancing.metrics()["tokens"] == 24  # of the last step that was trained


@pytest.mark.situation(
    "Checkpoints",
    "`load_best_model_at_end` with `state_file=False`",
    "warned: the state stays the last step's",
)
def test_a_best_checkpoint_without_a_state_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = BalanceCallback(mb.LossFree(speed=0.2), state_file=False)
    trainer_of(
        tmp_path,
        tiny("mixtral"),
        callback,
        Whole,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    ).train()
    assert "balancing state is still the last step's" in caplog.text


class Small(Trainer):
    """Runs out of memory at its second step with more than two rows, as a GPU would."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 2 and self.state.global_step == 1:
            super().training_step(model, inputs, *args, **kwargs)
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(model, inputs, *args, **kwargs)


def resumed(folder: Path, checkpoint: Path, steps: int, **more: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).train()
    callback = BalanceCallback(mb.LossFree(speed=0.01), **more)
    trainer_of(folder, model, callback, max_steps=steps).train(
        resume_from_checkpoint=str(checkpoint)
    )
    return callback.balancing


@pytest.mark.filterwarnings("ignore:.*batch size:UserWarning")
@pytest.mark.situation(
    "Checkpoints",
    "`auto_find_batch_size` after an out-of-memory",
    "works: checkpoints resume",
)
def test_a_run_whose_batch_size_was_found_after_running_out_of_memory_resumes(
    tmp_path: Path,
) -> None:
    callback = BalanceCallback(mb.LossFree(speed=0.01))
    trainer = trainer_of(
        tmp_path,
        tiny("mixtral"),
        callback,
        Small,
        max_steps=3,
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
    )
    trainer.train()
    assert (trainer.state.global_step, callback.balancing.steps) == (
        3,
        5,
    )  # attempts with 4, 3 and 2 rows
    assert callback.balancing.metrics()["tokens"] < 4 * 12  # nothing of the lost batch is left
    again = resumed(tmp_path, tmp_path / "checkpoint-3", 5)
    assert again.steps == 7


def two_phases(folder: Path) -> Any:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.LossFree(speed=0.01))
    for phase in ("one", "two"):
        trainer_of(folder / phase, model, BalanceCallback(balancing), max_steps=2).train()
    return balancing


@pytest.mark.situation(
    "Checkpoints",
    "Two trainings with one handle",
    "works: checkpoints of both resume",
)
def test_the_second_of_two_trainings_with_one_handle_resumes(tmp_path: Path) -> None:
    balancing = two_phases(tmp_path)
    price = price_of(balancing).clone()
    last = tmp_path / "two" / "checkpoint-2"
    with safe_open(last / mb.huggingface.STATE_FILE, framework="pt") as file:
        saved = json.loads(file.metadata()["moebalance"])
    assert (saved["steps"], saved["global_step"]) == (4, 2)
    model = tiny("mixtral")
    fresh = mb.attach(model, mb.LossFree(speed=0.01))
    mb.huggingface.load(fresh, last)
    assert torch.equal(price_of(fresh), price)
    assert resumed(tmp_path / "two", last, 3).steps == 5


def test_an_older_file_of_another_count_resumes_as_the_message_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_phases(tmp_path)
    last = tmp_path / "two" / "checkpoint-2"
    with safe_open(last / mb.huggingface.STATE_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["moebalance"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del metadata["global_step"]
    save_file(
        tensors, last / mb.huggingface.STATE_FILE, metadata={"moebalance": json.dumps(metadata)}
    )
    with pytest.raises(ValueError, match="say so: BalanceCallback"):
        resumed(tmp_path / "two", last, 3)
    caplog.set_level(logging.WARNING, "moebalance")
    assert resumed(tmp_path / "two", last, 3, resume_from=last).steps == 5
    assert "is taken for step 2" in caplog.text


@pytest.mark.survives(
    "Damaged and foreign states",
    "A Trainer resumes with the state of another step",
    "refused: before anything changes",
)
@pytest.mark.situation(
    "Checkpoints",
    "`resume_from=` names the folder of another step",
    "refused: the message names both steps",
)
def test_a_state_of_another_step_is_refused_before_anything_changes(tmp_path: Path) -> None:
    two_phases(tmp_path)
    other = tmp_path / "two" / "checkpoint-1"
    with pytest.raises(ValueError, match=r"saved at the trainer's step 1, but .* step 2"):
        resumed(tmp_path / "two", tmp_path / "two" / "checkpoint-2", 3, resume_from=other)


def test_the_state_comes_from_the_checkpoint_that_train_was_told_to_resume_from(
    tmp_path: Path,
) -> None:
    """Also where the output folder has a checkpoint of the same step, from another run."""
    for name, speed in (("first", 0.01), ("second", 0.3)):
        callback = BalanceCallback(mb.LossFree(speed=speed))
        trainer_of(tmp_path / name, tiny("mixtral"), callback, max_steps=2).train()
    callback = BalanceCallback(mb.LossFree(speed=0.0))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "checkpoint-2").train()
    trainer_of(tmp_path / "second", model, callback, max_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2")
    )
    assert 0 < price_of(callback.balancing).abs().max() < 0.03
