"""Runs of trackio, written by its own package and read back from its own database."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import Trainer

import moebalance as mb
from families import tiny
from moebalance.lab.trackers import track
from moebalance.metrics.image import load_image
from moebalance.runlog import read_run
from synthetic_runs import write_run
from training import Rows, arguments

# trackio reads it as it is imported.
STORE = Path(os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp()))
pytest.importorskip("trackio")
LOAD = [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]


@pytest.fixture
def project(tmp_path: Path) -> str:
    return f"see-{tmp_path.name}"


def rows(project: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(STORE / f"{project}.db")) as database:
        found = database.execute("select step, metrics from metrics order by id").fetchall()
    return [{"step": step, **json.loads(metrics)} for step, metrics in found]


def pixels(value: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(STORE / "media" / value["file_path"]))[..., :3]


def test_a_run_has_the_scalars_pictures_and_tables_of_the_log(tmp_path, project):
    named = {"name": project}
    run = read_run(write_run(tmp_path / "run", "phi", steps=20, experts=4, load=LOAD, header=named))
    track(run.path, ["trackio"])
    found = rows(project)
    maxvio = [(row["step"], row["moe/maxvio"]) for row in found if "moe/maxvio" in row]
    assert maxvio == [(row["step"], pytest.approx(row["maxvio"])) for row in run.steps]
    (last,) = (row for row in found if "eval/load" in row)
    assert (pixels(last["eval/load"]) == load_image(LOAD)).all()
    table = last["eval/extremes"]["_value"]
    assert table[0] == {"end": "hottest", "layer": "layer 0", "expert": 0, "load": 2}
    assert table[4] == {"end": "coldest", "layer": "layer 0", "expert": 3, "load": 0}
    assert len(table) == 8


def test_the_trainers_own_reporter_has_the_picture_and_the_table(tmp_path, project):
    callback = mb.huggingface.BalanceCallback(mb.PhiBalancing())
    settings = arguments(tmp_path, max_steps=2, report_to=["trackio"], project=project)
    Trainer(tiny("mixtral"), settings, train_dataset=Rows(4), callbacks=[callback]).train()
    found = rows(project)
    assert sum("train/moe/maxvio" in row for row in found) == 2
    pictures = [row for row in found if "train/moe/load" in row]
    assert [row["train/global_step"] for row in pictures] == [1, 2]
    loads = [hard for hard, _ in callback.balancing.loads().values()]
    assert (pixels(pictures[-1]["train/moe/load"]) == load_image(loads)).all()
    assert len(pictures[-1]["train/moe/extremes"]["_value"]) <= 10
