"""Lightning and Fabric: logging, attaching, resuming, and several processes."""

from __future__ import annotations

import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_models import Aside, Plain, WriteEnd, fabric_training, fitted, outcome, same, trainer
from torch import Tensor
from torch.utils.data import DataLoader

import moebalance as mb
from families import loss, tiny, tokens
from moebalance.integrations import lightning as lightning_integration
from moebalance.integrations.lightning import BalanceCallback
from tiny_moe import PHI, TinyMoE, hidden

pytestmark = [
    # Lightning on a torch newer than itself, and its advice on data loading.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


# Logs


class Memory(Logger):
    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_metrics_go_to_the_log_whenever_the_trainer_logs() -> None:
    memory, seen = Memory(), []
    module = Plain(rows=12)
    module.on_train_batch_end = lambda *_: seen.append(module.balancing.metrics())
    fitted(module, logger=memory, log_every_n_steps=2)
    assert [step for step, _ in memory.rows] == [1, 3, 5]
    for step, row in memory.rows:
        assert row["moe/tokens"] == 10
        assert {"moe/" + key for key in seen[step]} < set(row)
        assert row["moe/maxvio"] == pytest.approx(seen[step]["maxvio"])


# Attaching


class Language(LightningModule):
    """A Transformers model; its balancing state is nowhere in its own checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("mixtral")

    def training_step(self, ids: Tensor, index: int) -> Tensor:
        return loss(self.model, ids)

    def validation_step(self, ids: Tensor, index: int) -> None:
        self.log("loss", loss(self.model, ids))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(tokens(6, 12), batch_size=1)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(tokens(4, 12, seed=2), batch_size=4)


LANGUAGE = mb.Together(mb.PhiBalancing(strength=0.1, rate=0.3), mb.LossFree(speed=0.05))


def run(epochs: int, *others: Callback, **settings: Any) -> tuple[Trainer, BalanceCallback]:
    balance = BalanceCallback(LANGUAGE)
    given = {"max_epochs": epochs, "accumulate_grad_batches": 2, **settings}
    return trainer([*others, balance], **given), balance


def test_resuming_from_a_checkpoint_is_as_if_never_stopped(tmp_path: Path) -> None:
    whole, first, second = Language(), Language(), Language()
    straight, kept = run(2)
    straight.fit(whole)
    stopped, _ = run(1)
    stopped.fit(first)
    stopped.save_checkpoint(tmp_path / "end.ckpt")
    resumed, balance = run(2)
    resumed.fit(second, ckpt_path=tmp_path / "end.ckpt")
    expected = outcome(whole, kept.balancing)
    assert expected["ended"]["steps"] == 6
    assert same(outcome(second, balance.balancing), expected, rtol=0, atol=0)


def test_a_checkpoint_in_the_middle_of_an_epoch_holds_the_step_it_was_saved_after(
    tmp_path: Path,
) -> None:
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    training, _ = run(1, every, enable_checkpointing=True)
    training.fit(Language())
    for step in (1, 2, 3):
        saved = torch.load(tmp_path / f"step={step}.ckpt")
        assert saved["callbacks"]["BalanceCallback"]["balancing"]["steps"] == step
        assert not any("state_" in name for name in saved["state_dict"])


def test_a_checkpoint_is_evaluated_under_the_price_that_it_was_trained_with(
    tmp_path: Path,
) -> None:
    module = Language()
    training, _ = run(2)
    training.fit(module)
    training.save_checkpoint(tmp_path / "end.ckpt")
    settings: dict[str, Any] = {"verbose": False}
    here = trainer([], limit_val_batches=1.0).validate(module, **settings)
    settings["ckpt_path"] = tmp_path / "end.ckpt"
    fresh, _ = run(1, limit_val_batches=1.0)
    assert fresh.validate(Language(), **settings) == here
    with pytest.warns(UserWarning, match=r"add the following callbacks: \['BalanceCallback'\]"):
        without = trainer([], limit_val_batches=1.0).validate(Language(), **settings)
    assert without != here


def test_a_checkpoint_without_a_balancing_state_is_refused(tmp_path: Path) -> None:
    without = trainer([])
    without.fit(Language())
    without.save_checkpoint(tmp_path / "end.ckpt")
    resumed, _ = run(2)
    with pytest.raises(ValueError, match="holds no state of BalanceCallback"):
        resumed.fit(Language(), ckpt_path=tmp_path / "end.ckpt")


def test_a_checkpoint_saved_before_training_can_be_returned_to(tmp_path: Path) -> None:
    """A learning-rate finder does so."""
    module = Language()
    training, balance = run(1)
    training.strategy.connect(module)
    training.save_checkpoint(tmp_path / "start.ckpt")
    training.fit(module, ckpt_path=tmp_path / "start.ckpt")
    assert balance.balancing.steps == 3


def test_a_second_module_is_attached_to_anew() -> None:
    training, balance = run(1)
    training.fit(Language())
    first = balance.balancing
    again = trainer([balance])
    again.fit(Language())
    assert balance.balancing is not first
    assert (first.steps, balance.balancing.steps) == (3, 6)


def test_what_cannot_be_followed_is_refused_with_advice() -> None:
    class Engine(SingleDeviceStrategy):
        handles_gradient_accumulation = True

    with pytest.raises(TypeError, match=r"give what moebalance\.attach"):
        BalanceCallback("phi")
    with pytest.raises(RuntimeError, match="has no model yet"):
        _ = BalanceCallback(PHI).balancing
    dense = Plain()
    dense.model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="neither a Transformers model"):
        trainer([BalanceCallback(PHI)]).fit(dense)
    with pytest.raises(RuntimeError, match="Engine accumulates and scales gradients by itself"):
        fitted(Plain(), strategy=Engine(device="cpu"))


def test_the_same_callback_serves_pytorch_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = TinyMoE()

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.model(x).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    # As where nothing is installed but pytorch_lightning.
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    alone = runpy.run_path(lightning_integration.__file__)["BalanceCallback"]
    assert issubclass(alone, pytorch_lightning.Callback)
    for kind in (BalanceCallback, alone):
        module = Other()
        callback = kind(mb.attach(module))
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        training = pytorch_lightning.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[callback], **settings
        )
        training.fit(module, DataLoader(hidden(4, 5), batch_size=2))
        assert callback.balancing.steps == 2


# Several processes


def same_training(found: dict[str, Any], expected: dict[str, Any], batches: list[int]) -> bool:
    """Whether two trainings agree in all but how many batches a step of theirs had."""
    counts = [end["state"]["router"].pop("last_step")[1] for end in (found, expected)]
    assert counts == batches
    return same(found, expected, rtol=1e-4, atol=1e-5)


def test_two_processes_come_to_what_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    shared: dict[str, Any] = {"accumulate_grad_batches": 2, "max_epochs": 2}
    fitted(Aside(rows=16, batch=4), WriteEnd(one), **shared)
    fitted(Aside(rows=16, batch=2), WriteEnd(two), strategy="ddp_spawn", devices=2, **shared)
    expected, found = torch.load(one), torch.load(two)
    assert expected["ended"]["tokens"] == 2 * 4 * 5
    assert expected["ended"]["steps"] == 4
    # Among several ranks a step is never one batch: its own two, and two more.
    assert same_training(found, expected, [4, 2])


class Unrounded(MixedPrecision):
    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu"))

    def forward_context(self) -> Any:
        return nullcontext()

    def convert_input(self, data: Any) -> Any:
        return data


@pytest.mark.parametrize("plugins", [[], [Unrounded()]], ids=["plain", "scaled"])
def test_a_loop_in_fabric_does_not_depend_on_its_split(tmp_path: Path, plugins: Any) -> None:
    ends = {parts: tmp_path / f"{parts}.pt" for parts in (1, 4)}
    for parts, path in ends.items():
        fabric_training(Fabric(accelerator="cpu", devices=1, plugins=plugins), path, parts=parts)
    assert same_training(torch.load(ends[4]), torch.load(ends[1]), [4, 1])


def test_two_processes_of_fabric_come_to_what_one_does(tmp_path: Path) -> None:
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    fabric_training(Fabric(accelerator="cpu", devices=1), one)
    Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(fabric_training, two)
    expected, found = torch.load(one), torch.load(two)
    assert found["ended"]["tokens"] == 8 * 5
    assert same_training(found, expected, [4, 2])


# The documentation


@pytest.mark.filterwarnings("ignore:.*logging interval:UserWarning")
def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    handles = {"balance.balancing": 4, "module.balancing": 4, "balancing": 2}
    names: dict[str, Any] = {}
    for block, (handle, steps) in zip(blocks, handles.items(), strict=True):
        exec(compile(block, "lightning.md", "exec"), names)
        assert eval(handle, names).steps == steps
