"""Metrics reach every reporter of a Trainer, in whatever order its callbacks were given."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback

import moebalance as mb
from families import tiny
from moebalance.metrics.image import load_image
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


@pytest.mark.situation(
    "Metrics",
    '`report_to=["tensorboard"]`: a layer × expert picture, a table and percentiles',
    "works: they are in the event file, with a switch each",
)
def test_tensorboard_gets_a_picture_and_a_table_of_the_load(tmp_path: Path) -> None:
    model = tiny("mixtral")
    callback = BalanceCallback(mb.PhiBalancing())
    trainer_of(tmp_path, model, [callback], report_to=["tensorboard"]).train()
    (file,) = (tmp_path / "events").rglob("events.out.*")
    read = EventAccumulator(str(file), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert {"train/moe/layers/maxvio_p50", "train/moe/maxvio"} <= set(read.Tags()["scalars"])
    assert not any("layer_" in tag for tag in read.Tags()["scalars"])
    assert [image.step for image in read.Images("train/moe/load")] == [1, 2]
    last = read.Images("train/moe/load")[-1].encoded_image_string
    loads = [hard for hard, _ in callback.balancing.loads().values()]
    assert (np.asarray(Image.open(io.BytesIO(last))) == load_image(loads)).all()
    (_, text) = read.Tensors("train/moe/extremes/text_summary")
    assert "| hottest | layer " in text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize(
    ("show", "scalar", "picture"),
    [((), False, False), (["percentiles"], True, False), ("images", False, True)],
)
def test_each_thing_shown_has_a_switch(tmp_path, show, scalar: bool, picture: bool) -> None:
    callback = BalanceCallback(mb.PhiBalancing(), show=show)
    trainer = trainer_of(tmp_path, tiny("mixtral"), [callback], report_to=["tensorboard"])
    trainer.train()
    (file,) = (tmp_path / "events").rglob("events.out.*")
    tags = EventAccumulator(str(file)).Reload().Tags()
    assert ("train/moe/layers/gini_p90" in tags["scalars"]) == scalar
    assert len([key for key in trainer.state.log_history[0] if "moe/" in key]) <= 12
    assert tags["images"] == (["train/moe/load"] if picture else [])


def test_an_unknown_thing_to_show_is_refused() -> None:
    with pytest.raises(ValueError, match="layers, percentiles, images, tables"):
        BalanceCallback(mb.PhiBalancing(), show=["heatmap"])


def test_a_reporter_that_takes_no_picture_ends_no_training(tmp_path: Path, caplog) -> None:
    class TensorBoardCallback(TrainerCallback):
        """A reporter whose writer knows numbers alone."""

        tb_writer = SimpleNamespace(add_scalar=lambda *_: None)

    callback = BalanceCallback(mb.PhiBalancing())
    trainer = trainer_of(tmp_path, tiny("mixtral"), [callback, TensorBoardCallback()])
    trainer.train()
    assert "moe/maxvio" in trainer.state.log_history[1]
    told = [record.message for record in caplog.records if "picture" in record.message]
    assert len(told) == 1
    assert "add_image" in told[0]


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
