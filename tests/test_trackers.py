"""Trackers: TensorBoard's files read back, and what the others are told, by the log's own rows."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from typer.testing import CliRunner

import moebalance as mb
from moebalance import metrics
from moebalance.lab.cli import app
from moebalance.lab.trackers import following, scalars, track
from moebalance.metrics.image import DEAD_SHADE, SHADES, load_image, png
from moebalance.metrics.shown import Pace, Show, by_layer, extremes, multiples, percentiles
from moebalance.runlog import RunLog, read_run
from synthetic_runs import write_run


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.fixture
def told(monkeypatch) -> list[tuple[Any, ...]]:
    """W&B and trackio by their documented interface: init, and log and finish of its run."""
    calls: list[tuple[Any, ...]] = []

    def package(name: str) -> ModuleType:
        module = ModuleType(name)

        def init(**options: Any) -> SimpleNamespace:
            calls.append((name, "init", options))
            return SimpleNamespace(
                log=lambda data, step=None: calls.append((name, "log", data, step)),
                finish=lambda exit_code=None: calls.append((name, "finish", exit_code)),
            )

        module.init = init
        module.Image = lambda pixels: ("image", pixels.shape)
        module.Table = lambda columns, data: ("table", columns, data)
        return module

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, package(name))
    return calls


def test_tensorboard_reads_back_what_the_log_says(tmp_path):
    run = read_run(write_run(tmp_path / "phi-seed0", "phi", steps=20, snapshot_every=10))
    track(run.path, ["tensorboard"], folder=tmp_path / "out")
    found = events(tmp_path / "out" / "tensorboard" / "mixed-phi-seed0")
    assert found["moe/maxvio"] == [(r["step"], pytest.approx(r["maxvio"])) for r in run.steps]
    assert found["train/loss"] == [(r["step"], pytest.approx(r["loss"])) for r in run.steps]
    assert found["eval/loss"] == [(20, pytest.approx(run.evals[0]["loss"]))]
    first = run.snapshots[0]["load"][0]
    assert found["moe/layer_0/maxvio"][0] == (
        10,
        pytest.approx(max(first) * len(first) / sum(first) - 1),
    )


def test_every_tracker_is_told_the_same(tmp_path, told):
    path = write_run(tmp_path / "phi-seed0", "phi", steps=5, header={"name": "demo"})
    track(path, ["wandb", "trackio"])
    logs = {
        name: [
            (data, step)
            for who, what, *rest in told
            if (who, what) == (name, "log")
            for data, step in [rest]
        ]
        for name in ("wandb", "trackio")
    }
    assert logs["wandb"] == logs["trackio"]
    steps = [step for _, step in logs["wandb"]]
    assert steps == sorted(steps)
    (wandb, trackio) = (options for _, what, options, *_ in told if what == "init")
    assert wandb["project"] == trackio["project"] == "demo"
    assert wandb["name"] == trackio["name"] == "mixed-phi-seed0"
    assert wandb["config"]["method"] == "phi"
    assert ("wandb", "finish", 0) in told


def test_a_run_cut_short_is_not_called_a_success(tmp_path, told):
    track(write_run(tmp_path / "run", "phi", steps=9, stop=4), ["wandb"])
    assert told[-1] == ("wandb", "finish", 1)


def test_rows_are_sent_as_they_are_written_and_old_runs_are_left_alone(tmp_path, told):
    write_run(tmp_path / "old", "none", steps=3)
    with following(tmp_path, ["wandb"], every_s=0.01), RunLog(tmp_path / "new") as log:
        log.write("header", method="phi")
        for step in (1, 2, 3):
            log.write("step", step=step, loss=1.0 / step, maxvio=float("nan"))
    assert [call[2]["name"] for call in told if call[1] == "init"] == ["run-new"]
    assert [call[2:] for call in told if call[1] == "log"] == [
        ({"train/loss": 1.0}, 1),
        ({"train/loss": 0.5}, 2),
        ({"train/loss": pytest.approx(1 / 3)}, 3),
    ]
    assert told[-1] == ("wandb", "finish", 0)


def test_a_run_that_goes_on_is_sent_from_its_start(tmp_path, told):
    write_run(tmp_path, "phi", steps=9, stop=4, evaluate=False)
    with following(tmp_path, ["trackio"], every_s=0.01), RunLog.resume(tmp_path, 4) as log:
        log.write("step", step=5, loss=1.0)
    assert [call[3] for call in told if call[1] == "log"] == [1, 2, 3, 4, 5]


def test_a_line_that_is_being_written_waits(tmp_path, told):
    path = tmp_path / "log.jsonl"
    path.write_text('{"kind":"header","format":1,"method":"phi"}\n{"kind":"step","step":1,"lo')
    track(path, ["wandb"])
    assert [call[1] for call in told] == ["init", "finish"]


def test_the_training_is_whole_when_a_tracker_fails(tmp_path, told, monkeypatch):
    def broken(**options: Any) -> None:
        raise RuntimeError("no such host")

    monkeypatch.setattr(sys.modules["wandb"], "init", broken)
    with (
        pytest.raises(RuntimeError, match="no such host"),
        following(tmp_path, ["wandb"], every_s=60),
    ):
        write_run(tmp_path / "run", "phi", steps=5)
    assert read_run(tmp_path / "run").status == "complete"


def test_names_say_where_a_number_comes_from():
    row = {"kind": "eval", "step": 4, "loss": 1.5, "mi": 0.2, "load": [[1.0]], "tokens": None}
    assert scalars(row, {}) == {"eval/loss": 1.5, "eval/mi": 0.2}
    header = {"model": {"layers": ["model.layers.7.mlp.gate"]}}
    snapshot = {"kind": "snapshot", "step": 4, "load": [[0.75, 0.25, 0.0, 0.0]]}
    found = scalars(snapshot, header, Show.of(["layers"]))
    assert found == {"moe/layer_7/maxvio": 2.0, "moe/layer_7/dead": 0.5}


def test_an_unknown_tracker_and_one_not_installed_are_refused(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", "phi", steps=3)
    with pytest.raises(ValueError, match="the trackers are tensorboard, wandb, trackio"):
        track(path, ["mlflow"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        track(path, ["wandb"])


def test_the_command_says_in_a_line_what_to_install(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", "phi", steps=3)
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = CliRunner().invoke(app, ["track", str(path), "--to", "wandb"])
    assert done.exit_code == 2
    assert "pip install wandb" in done.output
    assert "Traceback" not in done.output


def test_the_command_sends_finished_runs(tmp_path):
    write_run(tmp_path / "run", "phi", steps=3)
    asked = ["track", str(tmp_path), "--to", "tensorboard", "--folder", str(tmp_path / "out")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "Sent 1 run to tensorboard" in done.output
    assert "moe/gini" in events(tmp_path / "out" / "tensorboard" / "mixed-run")


# Pictures and tables


def reload(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def colour(pixels: np.ndarray, layer: int, expert: int, cell: int) -> str:
    at = pixels[layer * cell + cell // 2, expert * cell + cell // 2]
    return "#" + "".join(f"{int(channel):02x}" for channel in at[:3])


def test_tensorboard_has_the_picture_and_the_table_of_every_snapshot(tmp_path):
    load = [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]
    run = read_run(write_run(tmp_path / "run", "phi", steps=40, load=load, experts=4))
    track(run.path, ["tensorboard"], folder=tmp_path / "out")
    found = reload(tmp_path / "out" / "tensorboard" / "mixed-run")
    assert set(found.Tags()["images"]) == {"moe/load", "eval/load"}
    assert [event.step for event in found.Images("moe/load")] == [20, 40]
    (event,) = found.Images("eval/load")
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert pixels.shape == (event.height, event.width, 3)
    shades = [colour(pixels, 0, expert, 16) for expert in range(4)]
    assert shades == [SHADES[9], SHADES[6], SHADES[6], DEAD_SHADE]
    (text,) = found.Tensors("eval/extremes")
    table = text.tensor_proto.string_val[0].decode()
    assert table.splitlines()[0] == "| end | layer | expert | load |"
    assert "| hottest | layer 0 | 0 | 2.0 |" in table
    assert "| coldest | layer 0 | 3 | 0.0 |" in table


def test_no_number_of_keys_or_rows_grows_with_the_experts(tmp_path, told):
    kept = []
    for experts in (8, 256):
        told.clear()
        write_run(tmp_path / f"{experts}", "phi", experts=experts, steps=20)
        track(tmp_path / f"{experts}", ["wandb"])
        rows = [call[2] for call in told if call[1] == "log"]
        tables = [value for row in rows for value in row.values() if "table" in str(value)]
        kept.append(({key for row in rows for key in row}, [len(t[2]) for t in tables]))
    (few_keys, few_rows), (many_keys, many_rows) = kept
    assert few_keys == many_keys
    assert few_rows == [8, 8] or max(few_rows) <= 10
    assert many_rows == [10, 10]


@pytest.mark.parametrize(
    ("words", "present"),
    [
        ("none", set()),
        ("images", {"moe/load", "eval/load"}),
        ("tables", {"moe/extremes", "eval/extremes"}),
        ("layers", {"moe/layer_0/maxvio"}),
        ("percentiles", {"moe/layers/gini_p50"}),
    ],
)
def test_each_has_a_switch_of_its_own(tmp_path, told, words, present):
    write_run(tmp_path / "run", "phi", steps=20)
    asked = ["track", str(tmp_path), "--to", "wandb", "--show", words]
    assert CliRunner().invoke(app, asked).exit_code == 0
    keys = {key for call in told if call[1] == "log" for key in call[2]}
    every = {"moe/load", "moe/extremes", "moe/layer_0/maxvio", "moe/layers/gini_p50"}
    assert (keys & (every | {"eval/load", "eval/extremes"})) == present
    assert "moe/maxvio" in keys


def test_an_unknown_thing_to_show_is_refused_with_the_known_ones(tmp_path):
    write_run(tmp_path / "run", "phi", steps=3)
    done = CliRunner().invoke(
        app, ["track", str(tmp_path), "--to", "tensorboard", "--show", "image"]
    )
    assert done.exit_code == 2
    assert "layers, percentiles, images, tables" in done.output


def test_a_long_run_sends_a_few_hundred_pictures_and_its_last():
    pace = Pace(planned=99_999)
    sent = [step for step in (*range(25, 99_999, 25), 99_999) if pace.due("snapshot", step)]
    assert 50 < len(sent) < 200
    assert sent[0] == 25
    assert sent[-1] == 99_999


def test_percentiles_are_of_layers():
    load = [[1.0 + i, 1.0, 1.0, 1.0] for i in range(11)]
    found = percentiles(multiples({f"l.{i}": layer for i, layer in enumerate(load)}))
    maxvio = [4 * (1 + i) / (4 + i) - 1 for i in range(11)]
    assert found["layers/maxvio_p10"] == pytest.approx(maxvio[1])
    assert found["layers/maxvio_p50"] == pytest.approx(maxvio[5])
    assert found["layers/maxvio_p90"] == pytest.approx(maxvio[9])
    gini = metrics.gini(torch.tensor(load[5])).item()
    assert found["layers/gini_p50"] == pytest.approx(gini)
    assert found["layers/dead_p90"] == 0
    assert percentiles([]) == {}


def test_layers_are_named_by_their_number_if_that_tells_them_apart():
    names = ["encoder.0.gate", "decoder.0.gate"]
    assert [name for name, _ in multiples({name: [3, 1] for name in names})] == names
    (found,) = multiples({"model.layers.7.gate": [3, 1], "model.layers.8.gate": [0, 0]})
    assert by_layer([found]) == {"layer_7/maxvio": 0.5, "layer_7/dead": 0.0}


def test_no_expert_is_called_hottest_and_coldest():
    rows = extremes(multiples({"0": [0.5, 0.3, 0.2]}))
    assert rows == [["hottest", "layer 0", 0, 1.5], ["coldest", "layer 0", 2, 0.6]]


def test_layers_of_other_sizes_and_without_tokens_have_their_place_in_the_picture():
    pixels = load_image([[1, 1, 1], [2, 0], [0, 0, 0]], cell=2)
    assert pixels.shape == (6, 6, 3)
    assert colour(pixels, 1, 1, 2) == DEAD_SHADE
    assert len({colour(pixels, *at, 2) for at in ((1, 2), (2, 0), (2, 2))}) == 1
    with pytest.raises(ValueError, match="one load"):
        load_image([])
    with pytest.raises(ValueError, match="1 or more"):
        load_image([[1]], cell=0)


def test_a_picture_file_says_what_the_pixels_are():
    pixels = load_image([[3, 1, 0, 0], [1, 1, 1, 1]])
    again = np.asarray(Image.open(io.BytesIO(png(pixels))))
    assert (again == pixels).all()


def test_a_loop_of_ones_own_draws_a_load_without_a_plotting_library(tmp_path):
    router = mb.BalancedRouter(mb.PhiBalancing(), num_experts=8, top_k=2)
    balancing = mb.attach(router)
    router(torch.randn(64, 8, requires_grad=True))[0].sum().backward()
    balancing.step()
    writer = SummaryWriter(tmp_path)
    loads = [hard.cpu() for hard, _ in balancing.loads().values()]
    writer.add_image("moe/load", mb.metrics.load_image(loads), 1, dataformats="HWC")
    writer.close()
    (event,) = reload(tmp_path).Images("moe/load")
    assert (event.height, event.width) == (16, 128)


def test_drawing_a_load_imports_no_plotting_library():
    code = (
        "import sys, moebalance.metrics as m; m.png(m.load_image([[1, 2]])); "
        "sys.exit('matplotlib' in sys.modules or 'PIL' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
