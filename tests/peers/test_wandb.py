"""An offline run of W&B, written by its own package and read back from its own file."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import Trainer

pytest.importorskip("wandb")
import wandb
from wandb.proto.wandb_internal_pb2 import Record

import moebalance as mb
from families import tiny
from moebalance.lab.trackers import track
from moebalance.metrics.image import load_image
from moebalance.runlog import read_run
from synthetic_runs import write_run
from training import Rows, arguments

LOAD = [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]


def records(file: Path) -> Iterator[Record]:
    """The records of a `.wandb` file: a head of 7 bytes, then the log format of LevelDB.

    Blocks of 32 KiB hold pieces: checksum, length, and 1 for a whole record or 2, 3, 4 for its
    first, middle and last piece.
    """
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        if len(piece) < length:  # not written to its end yet
            return
        whole, at = (piece if kind in (1, 2) else whole + piece), at + 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(whole)
            yield record


def history(file: Path) -> list[dict[str, Any]]:
    """The logged rows; nested keys are joined by dots."""
    return [
        {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        for record in records(file)
        if record.HasField("history")
    ]


def written(file: Path, last: str) -> list[dict[str, Any]]:
    """The logged rows, once W&B's own process has written the last: it does not wait for us."""
    end = time.monotonic() + 60
    while True:
        found = history(file)
        if any(key.startswith(last) for row in found for key in row) or time.monotonic() > end:
            return found
        time.sleep(0.2)


def test_an_offline_run_has_the_scalars_pictures_and_tables_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = read_run(write_run(tmp_path / "run", "phi", steps=20, experts=4, load=LOAD))
    track(run.path, ["wandb"])
    (file,) = (tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/run-*.wandb")
    rows = written(file, "eval/load")
    maxvio = [row["moe/maxvio"] for row in rows if "moe/maxvio" in row]
    assert maxvio == pytest.approx([row["maxvio"] for row in run.steps])
    (last,) = (row for row in rows if any(key.startswith("eval/load") for key in row))
    assert "image-file" in json.dumps(last)
    assert "table-file" in json.dumps(last)
    media = file.parent / "files" / "media"
    (picture,) = (media / "images" / "eval").glob("load_20_*.png")
    assert (np.asarray(Image.open(picture))[..., :3] == load_image(LOAD)).all()
    (table,) = (media / "table" / "eval").glob("extremes_20_*.json")
    found = json.loads(table.read_text())
    assert found["columns"] == ["end", "layer", "expert", "load"]
    assert found["data"][0] == ["hottest", "layer 0", 0, 2]
    assert found["data"][4] == ["coldest", "layer 0", 3, 0]
    assert len(found["data"]) == 8


def test_the_trainers_own_reporter_has_the_picture_and_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(dir=str(tmp_path), mode="offline")  # the reporter takes a run that is there
    callback = mb.huggingface.BalanceCallback(mb.PhiBalancing())
    settings = arguments(tmp_path, max_steps=2, report_to=["wandb"])
    Trainer(tiny("mixtral"), settings, train_dataset=Rows(4), callbacks=[callback]).train()
    run.finish()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    rows = written(file, "train/moe/load")
    assert sum("train/moe/maxvio" in row for row in rows) == 2
    pictures = [row for row in rows if any(key.startswith("train/moe/load") for key in row)]
    assert [row["train/global_step"] for row in pictures] == [1, 2]
    assert any(key.startswith("train/moe/extremes") for key in pictures[-1])
    (*_, picture) = sorted((file.parent / "files/media/images/train/moe").glob("load_*.png"))
    loads = [hard for hard, _ in callback.balancing.loads().values()]
    assert (np.asarray(Image.open(picture))[..., :3] == load_image(loads)).all()
