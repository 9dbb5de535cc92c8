"""The Hugging Face Trainer: strength under accumulation, logs, checkpoints, resuming."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import moebalance as mb
from families import tiny, tokens
from moebalance.integrations.huggingface import STATE_FILE, load, save

BalanceCallback = mb.huggingface.BalanceCallback


class Rows(Dataset):
    """Sequences, with some labels hidden."""

    def __init__(self, count: int) -> None:
        self.ids = tokens(count, 12, seed=3)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[item], "labels": self.ids[item]}


@dataclass(frozen=True)
class FixedPrice(mb.Balancer):
    """Charge the same price whatever happens: its gradient is additive over any split."""

    strength: float

    def charged(self, state: Any, batch: mb.Batch) -> Tensor:
        return self.strength * torch.linspace(-1, 1, batch.routing.num_experts)


class KeepGradient(TrainerCallback):
    """Router gradient as the optimizer is about to see it."""

    gradient: Tensor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradient = kwargs["model"].model.layers[0].mlp.gate.weight.grad.clone()


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def balance_gradient(folder: Path, accumulation: int, rows: int = 8, **changes: Any) -> Tensor:
    """Router gradient with a balancing term, less the one without, for one step of all rows."""
    gradients = []
    for strength in (1.0, 0.0):
        model = tiny("mixtral")
        balancing = mb.attach(model, FixedPrice(strength))
        keep = KeepGradient()
        Trainer(
            model,
            arguments(
                folder,
                per_device_train_batch_size=rows // accumulation,
                gradient_accumulation_steps=accumulation,
                **changes,
            ),
            train_dataset=Rows(rows),
            callbacks=[BalanceCallback(balancing), keep],
        ).train()
        gradients.append(keep.gradient)
    return gradients[0] - gradients[1]


@pytest.mark.parametrize("accumulation", [2, 4, 8])
@pytest.mark.parametrize("own_loss", [False, True], ids=["model-loss", "trainer-loss"])
def test_strength_means_the_same_under_accumulation(
    tmp_path: Path, accumulation: int, own_loss: bool
) -> None:
    # With label smoothing the Trainer computes the loss itself, and the model's is not there.
    changes = {"label_smoothing_factor": 0.1} if own_loss else {}
    whole = balance_gradient(tmp_path, 1, **changes)
    split = balance_gradient(tmp_path, accumulation, **changes)
    ratio = split.norm() / whole.norm()
    assert abs(ratio.item() - 1) < 1e-3
    assert (split - whole).norm() < 1e-3 * whole.norm()


def test_without_the_trainers_scale_the_term_would_be_wrong(tmp_path: Path) -> None:
    """The control for the test above: it can fail."""

    class Deaf(BalanceCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pass

    model = tiny("mixtral")
    keep = KeepGradient()
    Trainer(
        model,
        arguments(tmp_path, gradient_accumulation_steps=4, label_smoothing_factor=0.1),
        train_dataset=Rows(8),
        callbacks=[Deaf(mb.attach(model, FixedPrice(1.0))), keep],
    ).train()
    deaf = keep.gradient
    model = tiny("mixtral")
    Trainer(
        model,
        arguments(tmp_path, gradient_accumulation_steps=4, label_smoothing_factor=0.1),
        train_dataset=Rows(8),
        callbacks=[BalanceCallback(mb.attach(model, FixedPrice(0.0))), keep],
    ).train()
    heard = balance_gradient(tmp_path, 4, label_smoothing_factor=0.1)
    assert ((deaf - keep.gradient).norm() / heard.norm()).item() == pytest.approx(4, rel=1e-3)


def trained(folder: Path, *, steps: int, resume: bool = False, stop_at: int | None = None) -> Any:
    """Train with φ and loss-free together; return model, balancing and trainer.

    A Trainer that resumes does not load experts which Transformers saves under other names than it
    holds them (5.23 logs "missing keys" and goes on); `from_pretrained` does, so it comes first.
    """
    model = tiny("deepseek_v3")
    if resume:
        newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        model = type(model).from_pretrained(newest).train()
    both = mb.Together(mb.PhiBalancing(strength=0.1), mb.LossFree(rate=0.01))
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


def test_leading_callback_lets_other_loggers_see_the_metrics(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            seen.append(set(logs))

    model = tiny("mixtral")
    callback = BalanceCallback(mb.attach(model, mb.PhiBalancing()))
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=Rows(4), callbacks=[Reporter(), callback]
    )
    callback.lead(trainer)
    trainer.train()
    assert "moe/maxvio" in seen[0]


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
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="resume_from"):
        trained(tmp_path, steps=6, resume=True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    return save(balancing, tmp_path)


def test_a_state_file_round_trips(saved: Path) -> None:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    load(balancing, saved.parent)
    assert balancing.steps == 1
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    assert not list(saved.parent.glob("*.partial"))


def test_a_truncated_state_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        load(mb.attach(tiny("mixtral"), mb.PhiBalancing()), saved.parent)


def test_a_state_file_of_another_method_model_or_format_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="belongs to PhiBalancing, but the model is balanced by"):
        load(mb.attach(tiny("mixtral"), mb.LossFree()), saved.parent)
    with pytest.raises(ValueError, match="another model"):
        load(mb.attach(tiny("deepseek_v3"), mb.PhiBalancing()), saved.parent)
    with pytest.raises(ValueError, match="does not fit"):
        load(mb.attach(tiny("mixtral", num_local_experts=4), mb.PhiBalancing()), saved.parent)
    raw = saved.read_bytes()
    for old, new in ((rb"\"format\": 1", rb"\"format\": 9"), (rb"moebalance", rb"moebalancf")):
        assert old in raw
        saved.write_bytes(raw.replace(old, new))
        with pytest.raises(ValueError, match=r"format 9|not written by moebalance"):
            load(mb.attach(tiny("mixtral"), mb.PhiBalancing()), saved.parent)


def test_a_callback_saves_beside_each_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path, steps=6)
    for step in (3, 6):
        folder = tmp_path / f"checkpoint-{step}"
        assert (folder / STATE_FILE).is_file()
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step


def test_more_than_one_process_is_refused_for_now(tmp_path: Path) -> None:
    class Several(TrainingArguments):
        world_size = 2

    callback = BalanceCallback(mb.attach(tiny("mixtral"), mb.PhiBalancing()))
    with pytest.raises(RuntimeError, match="2 processes"):
        callback.on_train_begin(Several(str(tmp_path)), None, None, model=tiny("mixtral"))


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
            return {"input_ids": self.ids[item], "labels": torch.tensor(item % 2)}

    gradients = []
    for split, strength in ((1, 1.0), (1, 0.0), (accumulation, 1.0), (accumulation, 0.0)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(tiny("mixtral").config).train()
        keep = KeepGradient()
        Trainer(
            model,
            arguments(
                tmp_path, per_device_train_batch_size=4 // split, gradient_accumulation_steps=split
            ),
            train_dataset=Labelled(4),
            callbacks=[BalanceCallback(mb.attach(model, FixedPrice(strength))), keep],
        ).train()
        gradients.append(keep.gradient)
    whole, parts = gradients[0] - gradients[1], gradients[2] - gradients[3]
    assert whole.norm() > 0
    assert (parts - whole).norm() < 1e-3 * whole.norm()
