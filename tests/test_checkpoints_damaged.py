"""A run that resumes passes over a checkpoint that it could not go on from, whatever is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments import small, write_text
from moebalance.integrations.huggingface import STATE_FILE
from moebalance.lab.checkpoints import last_whole_checkpoint
from moebalance.lab.recipe import Recipe
from moebalance.lab.train import train_run
from moebalance.runlog import read_run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = small(write_text(tmp_path_factory.mktemp("text")))
    return replace(recipe, train=replace(recipe.train, steps=4, save_every=2))


def run(recipe: Recipe, folder: Path, **options: bool) -> Path:
    return train_run(
        recipe, method="phi+loss-free", seed=0, batching="mixed", folder=folder, **options
    )


@pytest.fixture(scope="module")
def saved(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of its steps 2 and 4."""
    return run(recipe, tmp_path_factory.mktemp("saved")).parent


Damage = Callable[[Path], object]


def holds(name: str, content: object) -> Damage:
    return lambda checkpoint: torch.save(content, checkpoint / name)


def says(name: str, **values: object) -> Damage:
    def change(checkpoint: Path) -> None:
        table = json.loads((checkpoint / name).read_text())
        (checkpoint / name).write_text(json.dumps({**table, **values}))

    return change


def tensors(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Damage:
    def changed(checkpoint: Path) -> None:
        path = checkpoint / name
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file(change(load_file(path)), path, metadata=metadata)

    return changed


def without(word: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda held: {key: tensor for key, tensor in held.items() if word not in key}


def with_nan(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.full_like(tensor, torch.nan) for key, tensor in held.items()}


def shorter(word: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def cut(held: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t[:-1].contiguous() if word in k and t.dim() else t for k, t in held.items()}

    return cut


WEIGHTS = "model.safetensors"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no router": (tensors(WEIGHTS, without("0.mlp.gate")), "missing keys model.layers.0.mlp.gate"),
    "no expert": (tensors(WEIGHTS, without("experts.3.")), "mismatched keys"),
    "another shape": (tensors(WEIGHTS, shorter("mlp.gate")), "mismatched keys"),
    "NaN": (tensors(WEIGHTS, with_nan), "is not finite"),
    "another kind of model": (says("config.json", model_type="llama"), "does not fit a llama"),
    "a word in the configuration": (says("config.json", hidden_size="x"), "hidden_size"),
    "an optimizer of nothing": (holds("optimizer.pt", {"a": 1}), "no state of an optimizer"),
    "a list of an optimizer": (holds("optimizer.pt", [1, 2]), "no state of an optimizer"),
    "a word of a schedule": (holds("scheduler.pt", "x"), "no state of a schedule"),
    "a scaler of junk": (lambda c: (c / "scaler.pt").write_bytes(b"junk"), "scaler.pt"),
    "no random numbers": (holds("rng_state.pth", {"python": 1}), "no state of random numbers"),
    "an unknown key": (says("trainer_state.json", evil=1), "trainer_state.json cannot be read"),
    "a step in words": (says("trainer_state.json", global_step="x"), "says step x"),
    "another step": (says("trainer_state.json", global_step=3), "says step 3"),
    "a state of NaN": (tensors(STATE_FILE, with_nan), "state of"),
    "a state of fewer experts": (tensors(STATE_FILE, shorter("/")), "does not fit"),
    "no state": (tensors(STATE_FILE, lambda held: {}), "is of 0 of 2 routers"),
}


@pytest.mark.survives(
    "Killed and resumed",
    "A file of the last checkpoint can be read, and does not fit: weights lacking, NaN, odd values",
    "goes on: from the checkpoint before",
)
@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_does_not_fit_is_passed_over_with_the_reason(
    saved: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, reason = DAMAGES[name]
    shutil.copytree(saved, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-4")
    assert last_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert "checkpoint-4 is not whole" in caplog.text
    assert reason in caplog.text


def test_a_folder_named_after_no_step_is_passed_over(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "run" / "checkpoint-²")
    assert last_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def test_a_run_resumes_past_weights_that_lack_a_router(
    recipe: Recipe, saved: Path, tmp_path: Path
) -> None:
    longer = replace(recipe, train=replace(recipe.train, steps=6))
    shutil.copytree(saved, tmp_path / "run")
    shutil.copytree(saved, tmp_path / "other")
    DAMAGES["no router"][0](tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "other" / "checkpoint-4")
    losses = [
        [row["loss"] for row in read_run(run(longer, tmp_path / folder, resume=True)).steps]
        for folder in ("run", "other")
    ]
    assert losses[0] == losses[1]


def test_a_stray_scaler_is_left_alone(recipe: Recipe, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    holds("scaler.pt", {"scale": 1.0})(tmp_path / "run" / "checkpoint-4")
    longer = replace(recipe, train=replace(recipe.train, steps=6))
    assert read_run(run(longer, tmp_path / "run", resume=True)).status == "complete"
