"""The Hugging Face Trainer: strength under accumulation, logs, checkpoints, resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
)

import moebalance as mb
from families import tiny
from training import (
    BalanceCallback,
    FixedPrice,
    KeepGradient,
    Rows,
    agree,
    arguments,
    compiled_and_eager,
    light_collections,
    plain,
    scaled,
    term_gradients,
)


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


def parts_of(rows: int, split: int) -> dict[str, int]:
    """Settings for a step of all rows in so many micro-batches."""
    return {"per_device_train_batch_size": rows // split, "gradient_accumulation_steps": split}


@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("own_loss", [False, True], ids=["model-loss", "trainer-loss"])
def test_strength_means_the_same_under_accumulation(
    tmp_path: Path, split: int, own_loss: bool
) -> None:
    # With label smoothing the Trainer computes the loss itself, and the model's is not there.
    make = plain(tmp_path, Rows(8), **({"label_smoothing_factor": 0.1} if own_loss else {}))
    (whole,) = term_gradients(make, **parts_of(8, 1))
    (parts,) = term_gradients(make, **parts_of(8, split))
    assert agree(parts, whole)


def test_strength_means_the_same_with_a_loss_function_of_the_users(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    make = plain(tmp_path, Rows(8), kind=partial(Trainer, compute_loss_func=loss))
    (whole,) = term_gradients(make, **parts_of(8, 1))
    (parts,) = term_gradients(make, **parts_of(8, 4))
    assert agree(parts, whole)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"bf16": True}, 2e-2),  # of rounding, element by element; the size stays
        ({"activation_checkpointing": True}, 1e-3),
        (
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True},
            },
            1e-3,
        ),
    ],
    ids=["bf16", "recompute", "reentrant"],
)
@pytest.mark.parametrize("own_loss", [False, True], ids=["model-loss", "trainer-loss"])
def test_strength_is_the_same_in_every_mode(
    tmp_path: Path, settings: dict[str, Any], tolerance: float, own_loss: bool
) -> None:
    smoothing = {"label_smoothing_factor": 0.1} if own_loss else {}
    (whole,) = term_gradients(plain(tmp_path, Rows(8), **smoothing), **parts_of(8, 1))
    make = plain(tmp_path, Rows(8), **smoothing, **settings)
    (parts,) = term_gradients(make, **parts_of(8, 2))
    assert agree(parts, whole, tolerance)
    assert abs(parts.norm() / whole.norm() - 1) < 5e-3


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_strength_is_the_same_compiled(tmp_path: Path) -> None:
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    whole, parts = compiled_and_eager(plain(tmp_path, Rows(8), **parts_of(8, 2)), compiling)
    assert agree(parts, whole)


@pytest.mark.parametrize("split", [2, 4, 8])
@pytest.mark.parametrize("own_loss", [False, True], ids=["model-loss", "trainer-loss"])
def test_weights_of_ragged_micro_batches_sum_to_one(
    tmp_path: Path, split: int, own_loss: bool
) -> None:
    """Of one repeated token, micro-batches have the same mean: the sum of weights is left."""
    rows = Rows(8, [31, 4, 17, 9, 25, 5, 11, 40])
    for row in rows.rows:
        row.fill_(7)
    make = plain(tmp_path, rows, **({"label_smoothing_factor": 0.1} if own_loss else {}))
    (whole,) = term_gradients(make, **parts_of(8, 1))
    (parts,) = term_gradients(make, **parts_of(8, split))
    assert agree(parts, whole)


def test_ragged_micro_batches_weigh_by_their_labels(tmp_path: Path) -> None:
    make = plain(tmp_path, Rows(8, [60, 25, 22, 58, 23, 27, 44, 31]))
    (whole,) = term_gradients(make, **parts_of(8, 1))
    for split in (2, 8):
        (parts,) = term_gradients(make, **parts_of(8, split))
        assert abs(parts.norm() / whole.norm() - 1) < 5e-3


@pytest.mark.parametrize("own_loss", [False, True], ids=["model-loss", "trainer-loss"])
@pytest.mark.parametrize("kind", [Trainer, scaled(Trainer)], ids=["plain", "scaler"])
def test_a_short_last_step_of_an_epoch_and_a_gradient_scaler_change_nothing(
    tmp_path: Path, own_loss: bool, kind: type[Trainer]
) -> None:
    """Six rows by fours, one at a time: every second step has two micro-batches."""
    smoothing = {"label_smoothing_factor": 0.1} if own_loss else {}
    make = plain(tmp_path, Rows(6), learning_rate=0.0, **smoothing)
    pair = term_gradients(make, per_device_train_batch_size=2, max_steps=3)
    make = plain(tmp_path, Rows(6), kind=kind, learning_rate=0.0, max_steps=4, **smoothing)
    first, last, again, last_again = term_gradients(
        make, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert agree(first, (pair[0] + pair[1]) / 2)
    assert agree(last, pair[2])
    assert agree(again, first)
    assert agree(last_again, last)


def test_a_resumed_epoch_knows_its_short_last_step(tmp_path: Path) -> None:
    make = plain(
        tmp_path,
        Rows(6),
        label_smoothing_factor=0.1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
        save_strategy="steps",
        save_steps=1,
    )
    found = []
    for strength in (1.0, 0.0):
        make(tiny("mixtral"), [BalanceCallback(FixedPrice(strength))], max_steps=1).train()
        model = type(tiny("mixtral")).from_pretrained(tmp_path / "checkpoint-1").train()
        keep = KeepGradient()
        trainer = make(model, [BalanceCallback(FixedPrice(strength)), keep], max_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        found.append(keep.gradient)
    whole = term_gradients(
        plain(tmp_path, Rows(6), label_smoothing_factor=0.1, learning_rate=0.0),
        per_device_train_batch_size=2,
        max_steps=3,
    )
    assert agree(found[0] - found[1], whole[2])


def test_without_the_trainers_scale_the_term_would_be_wrong(tmp_path: Path) -> None:
    """The control for the test above: it can fail."""

    class Deaf(BalanceCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.balancing.set_loss_scale(1.0)

    make = plain(tmp_path, Rows(8), label_smoothing_factor=0.1)
    gradients = []
    for callback in (Deaf(FixedPrice(1.0)), BalanceCallback(FixedPrice(0.0))):
        keep = KeepGradient()
        make(tiny("mixtral"), [callback, keep], **parts_of(8, 4)).train()
        gradients.append(keep.gradient)
    deaf = gradients[0] - gradients[1]
    (heard,) = term_gradients(make, **parts_of(8, 4))
    assert (deaf.norm() / heard.norm()).item() == pytest.approx(4, rel=1e-3)


def trained(folder: Path, *, steps: int, resume: bool = False, stop_at: int | None = None) -> Any:
    """Train with φ and loss-free together; return model, balancing and trainer.

    A Trainer that resumes does not load experts which Transformers saves under other names than it
    holds them (5.23 logs "missing keys" and goes on); `from_pretrained` does, so it comes first.
    """
    model = tiny("deepseek_v3")
    if resume:
        newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        model = type(model).from_pretrained(newest).train()
    both = mb.Together(mb.PhiBalancing(strength=0.1), mb.LossFree(speed=0.01))
    balancing = mb.attach(model, both)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop_at:
                control.should_training_stop = True

    trainer = Trainer(
        model,
        arguments(
            folder,
            max_steps=steps,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=3,
            train_sampling_strategy="random",
        ),
        train_dataset=Rows(32),
        callbacks=[BalanceCallback(balancing), Stop()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, balancing, trainer


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    model, balancing, _ = trained(tmp_path / "whole", steps=6)
    trained(tmp_path / "halves", steps=6, stop_at=4)
    again, resumed, trainer = trained(tmp_path / "halves", steps=6, resume=True)
    assert trainer.state.global_step == resumed.steps == 6
    for (name, mine), theirs in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    mine, theirs = balancing.state_dict(), resumed.state_dict()
    assert mine["steps"] == theirs["steps"]
    for name, layer in mine["layers"].items():
        assert all(torch.equal(layer[key], theirs["layers"][name][key]) for key in layer)


def test_metrics_join_the_trainers_log_without_a_key_per_expert(tmp_path: Path) -> None:
    _, _, trainer = trained(tmp_path, steps=2)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    ours = {key for key in entries[0] if key.startswith("moe/")}
    assert {"moe/maxvio", "moe/gini", "moe/soft_hard_gap", "moe/price_spread"} <= ours
    assert len(ours) <= 12
    assert entries[0]["moe/tokens"] == 2 * 2 * 12


def test_a_native_loss_switched_on_after_attaching_is_switched_off(tmp_path: Path) -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.PhiBalancing())
    model.config.output_router_logits = True  # as TRL's trainers do
    Trainer(
        model,
        arguments(tmp_path),
        train_dataset=Rows(4),
        callbacks=[BalanceCallback(balancing)],
    ).train()
    assert model.config.output_router_logits is False


def test_resuming_without_a_balancing_state_says_where_it_looked(tmp_path: Path) -> None:
    trained(tmp_path, steps=6, stop_at=4)
    (tmp_path / "checkpoint-3" / mb.huggingface.STATE_FILE).unlink()
    (tmp_path / "checkpoint-4" / mb.huggingface.STATE_FILE).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="resume_from"):
        trained(tmp_path, steps=6, resume=True)


def test_a_checkpoint_that_the_arguments_name_is_resumed_from(tmp_path: Path) -> None:
    trained(tmp_path / "first", steps=6, stop_at=4)
    checkpoint = max((tmp_path / "first").glob("checkpoint-*"), key=lambda path: path.name)
    for named in (str(checkpoint), "True", None):  # "True": as a command line has it
        model = tiny("deepseek_v3")
        balancing = mb.attach(
            model, mb.Together(mb.PhiBalancing(strength=0.1), mb.LossFree(speed=0.01))
        )
        settings = arguments(tmp_path / "second", max_steps=6, gradient_accumulation_steps=2)
        settings.resume_from_checkpoint = named
        trainer = Trainer(
            model, settings, train_dataset=Rows(32), callbacks=[BalanceCallback(balancing)]
        )
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert balancing.steps == 6


def test_a_callback_saves_beside_each_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, steps=6)
    for step in (3, 6):
        folder = tmp_path / f"checkpoint-{step}"
        assert (folder / mb.huggingface.STATE_FILE).is_file()
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step


def test_training_twice_with_one_handle_goes_on(tmp_path: Path) -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.PhiBalancing())
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=Rows(4),
        callbacks=[BalanceCallback(balancing)],
    )
    trainer.train()
    trainer.train()
    assert balancing.steps == 2


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_classifiers_labels_are_counted_unshifted(tmp_path: Path, accumulation: int) -> None:
    """With labels (B,) a causal shift would leave none in batches of one, and no balancing."""

    class Labelled(Rows):
        def __getitem__(self, item: int) -> dict[str, Tensor]:
            return {"input_ids": self.rows[item], "labels": torch.tensor(item % 2)}

    gradients = []
    for split, strength in ((1, 1.0), (1, 0.0), (accumulation, 1.0), (accumulation, 0.0)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(tiny("mixtral").config).train()
        keep = KeepGradient()
        Trainer(
            model,
            arguments(tmp_path, **parts_of(4, split)),
            train_dataset=Labelled(4),
            callbacks=[BalanceCallback(mb.attach(model, FixedPrice(strength))), keep],
        ).train()
        gradients.append(keep.gradient)
    assert agree(gradients[2] - gradients[3], gradients[0] - gradients[1])
