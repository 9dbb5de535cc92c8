"""Metrics reach every reporter of a Trainer, in whatever order its callbacks were given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback

import moebalance as mb
from families import tiny
from moebalance.runlog import read_run
from training import BalanceCallback, Rows, arguments, light_collections


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


@pytest.fixture(autouse=True)
def _events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))


class Reporter(TrainerCallback):
    """What a reporter is told."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.seen.append(set(logs))


def scalars(folder: Path) -> dict[str, list[float]]:
    """Scalars of a TensorBoard event file by tag."""
    (file,) = (folder / "events").rglob("events.out.*")
    read = EventAccumulator(str(file))
    read.Reload()
    tags = read.Tags()["scalars"]
    return {tag: [event.value for event in read.Scalars(tag)] for tag in tags}


def trainer_of(folder: Path, model: Any, callbacks: list[Any], **changes: Any) -> Trainer:
    settings = arguments(folder, max_steps=2, **changes)
    return Trainer(model, settings, train_dataset=Rows(4), callbacks=callbacks)


@pytest.mark.situation(
    "Metrics",
    '`report_to=["tensorboard"]` with the documented lines',
    "works: the `moe/` scalars are in the event file",
)
def test_the_documented_lines_bring_metrics_to_tensorboard(tmp_path: Path) -> None:
    model = tiny("mixtral")
    callback = BalanceCallback(mb.attach(model, mb.PhiBalancing()))
    trainer_of(tmp_path, model, [callback], report_to=["tensorboard"]).train()
    found = scalars(tmp_path)
    ours = {tag for tag in found if "moe/" in tag}
    assert {"moe/maxvio", "moe/dead", "moe/tokens"} <= {tag.removeprefix("train/") for tag in ours}
    assert all(len(found[tag]) == 2 for tag in ours)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("added_later", [True, False])
@pytest.mark.situation(
    "Metrics",
    "Reporters given before or after the callback, or added later",
    "works",
)
def test_every_reporter_sees_them_in_whatever_order(
    tmp_path: Path, ours_first: bool, added_later: bool
) -> None:
    callback, reporter = BalanceCallback(mb.PhiBalancing()), Reporter()
    both = [callback, reporter] if ours_first else [reporter, callback]
    trainer = trainer_of(tmp_path, tiny("mixtral"), [] if added_later else both)
    for each in both if added_later else ():
        trainer.add_callback(each)
    trainer.train()
    first, second, end = reporter.seen
    assert {"loss", "moe/maxvio"} <= first & second
    assert not any(name.startswith("moe/") for name in end)  # the summary of the run


def test_a_monitor_reports_too_and_records_each_step_once(tmp_path: Path) -> None:
    model, reporter = tiny("mixtral"), Reporter()
    with mb.monitor(model, tmp_path / "log") as watch:
        callback = mb.huggingface.MonitorCallback(watch)
        trainer_of(tmp_path, model, [reporter, callback]).train()
    assert "moe/maxvio" in reporter.seen[0]
    assert [row["step"] for row in read_run(tmp_path / "log").steps if "loss" in row] == [1, 2]


def test_a_removed_callback_adds_nothing(tmp_path: Path) -> None:
    model, reporter = tiny("mixtral"), Reporter()
    callback = BalanceCallback(mb.attach(model, mb.PhiBalancing()))
    trainer = trainer_of(tmp_path, model, [reporter, callback])
    trainer.remove_callback(callback)
    trainer.train()
    assert not any("moe/maxvio" in names for names in reporter.seen)


def test_training_again_puts_one_stand_in_in_front(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tiny("mixtral"), [BalanceCallback(mb.PhiBalancing())])
    before = len(trainer.callback_handler.callbacks)
    trainer.train()
    trainer.train()
    assert len(trainer.callback_handler.callbacks) == before
