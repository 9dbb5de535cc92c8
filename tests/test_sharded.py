"""A recipe on two ranks, on copies (DDP) or in parts (FSDP2), is the run of one process."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

import moebalance as mb
from experiments import MODEL
from moebalance.integrations.huggingface.sharded import PARTS, sharding_for_accelerate
from moebalance.lab.checkpoints import last_whole_checkpoint
from moebalance.lab.recipe import Recipe
from moebalance.lab.train import train_run
from moebalance.runlog import LOG_NAME, read_run
from processes import run

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

STEPS, SAVED = 6, 4
KINDS = ("parts", "copies")
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
"""To the rounding of another order of summation."""


def recipe(text: Path, *, sharded: bool, tied: bool = False) -> Recipe:
    """Steps of four sequences: two micro-batches on one process, one on each of two ranks."""
    train = {"steps": STEPS, "batch_size": 2, "accumulation": 2, "eval_sequences": 8}
    table = {
        "name": "small",
        "model": {**MODEL, "tie_word_embeddings": tied},
        "data": {"source": str(text), "seq_len": 32},
        "train": {**train, "save_every": 2, "sharded": sharded},
    }
    return Recipe.parse(table, source="small.toml")


def trained(
    root: Path, name: str, *, sharded: bool, resume: bool = False, tied: bool = False
) -> None:
    train_run(
        recipe(root / "text", sharded=sharded, tied=tied),
        method="phi(strength=0.32, rate=0.1)+loss-free(speed=0.01)",
        seed=0,
        batching="mixed",
        folder=root / name,
        resume=resume,
        save_model=True,
    )


def as_killed(root: Path, name: str, copy: str) -> None:
    """A run as it was after its checkpoint of step 4."""
    shutil.copytree(root / name, root / copy)
    shutil.rmtree(root / copy / f"checkpoint-{STEPS}")
    shutil.rmtree(root / copy / "final")


def on_two_ranks(root: Path) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # As torchrun would have it.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    warnings.simplefilter("ignore")  # the Trainer's own, on gloo
    trained(root, "parts on 2", sharded=True)
    trained(root, "copies on 2", sharded=False)
    trained(root, "tied on 2", sharded=True, tied=True)
    if rank == 0:
        as_killed(root, "parts on 2", "parts 2 to 2")
    dist.barrier()
    for kind in KINDS:
        trained(root, f"{kind} 1 to 2", sharded=kind == "parts", resume=True)
    trained(root, "parts 2 to 2", sharded=True, resume=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole runs on one process and two ranks, and runs that changed from one to the other."""
    root = tmp_path_factory.mktemp("runs")
    for domain, words in {"animals": "cat dog bird fish ", "numbers": "1 23 456 7890 "}.items():
        (root / "text" / domain).mkdir(parents=True)
        for part in range(6):
            (root / "text" / domain / f"{part}.txt").write_text(f"{part} {words * 200}")
    for kind in KINDS:
        trained(root, f"{kind} on 1", sharded=kind == "parts")
        as_killed(root, f"{kind} on 1", f"{kind} 1 to 2")
    trained(root, "tied on 1", sharded=False, tied=True)
    run(on_two_ranks, 2, root)
    for kind in KINDS:
        as_killed(root, f"{kind} on 2", f"{kind} 2 to 1")
        trained(root, f"{kind} 2 to 1", sharded=kind == "parts", resume=True)
    return root


def rows(folder: Path) -> list[dict[str, object]]:
    """A run log without its header, and without what a clock wrote."""
    lines = [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if key not in ("step_time_s", "wall_s")}
        for row in lines
        if row["kind"] not in ("header", "end")
    ]


def agree(found: Path, expected: Path) -> None:
    log = read_run(found / LOG_NAME)
    assert log.status == "complete"
    assert [row["step"] for row in log.steps] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(rows(found), rows(expected), strict=True):
        assert mine.pop("kind") == theirs.pop("kind")
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(
                torch.tensor(mine[key]), torch.tensor(value), **CLOSE, msg=f"{theirs['step']} {key}"
            )
    torch.testing.assert_close(weights(found), weights(expected), **CLOSE)


def test_a_run_that_was_taken_up_was_not_begun_anew(root: Path) -> None:
    for kind, way in (("parts", "2 to 2"), *((k, w) for k in KINDS for w in ("1 to 2", "2 to 1"))):
        went_on = (root / f"{kind} {way}" / LOG_NAME).read_text().splitlines()
        whole = (root / f"{kind} on {way[0]}" / LOG_NAME).read_text().splitlines()
        # Down to what the clock said; a header, and a row for each step.
        assert went_on[: 1 + SAVED] == whole[: 1 + SAVED]
        assert went_on[1 + SAVED] != whole[1 + SAVED]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["on 2", "1 to 2", "2 to 1"])
def test_the_numbers_are_those_of_one_process(root: Path, kind: str, way: str) -> None:
    agree(root / f"{kind} {way}", root / "copies on 1")


def test_embeddings_that_are_also_the_head_are_sharded_too(root: Path) -> None:
    agree(root / "tied on 2", root / "tied on 1")
    tied = weights(root / "tied on 2")
    assert torch.equal(tied["lm_head.weight"], tied["model.embed_tokens.weight"])


def test_on_as_many_ranks_as_before_it_goes_on_bit_for_bit(root: Path) -> None:
    assert rows(root / "parts 2 to 2") == rows(root / "parts on 2")
    again, whole = weights(root / "parts 2 to 2"), weights(root / "parts on 2")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(("way", "pieces"), [("on 1", 1), ("on 2", 2)])
def test_a_sharded_run_splits_every_layer_over_the_ranks(root: Path, way: str, pieces: int) -> None:
    folder = root / f"parts {way}" / f"checkpoint-{STEPS}"
    saved = FileSystemReader(folder / PARTS).read_metadata().state_dict_metadata
    whole = [name for name in saved if "layers." in name and "balancing" not in name]
    tensors = {name: len(saved[name].chunks) for name in whole if hasattr(saved[name], "chunks")}
    own = {name: n for name, n in tensors.items() if not name.endswith(".step")}
    assert set(own.values()) == {pieces}
    # Weights and two moments of each: attention 6, router and experts 3, norms 2, in two layers.
    assert len(own) == 3 * 2 * 11


@pytest.mark.parametrize("way", ["on 1", "on 2"])
def test_a_distributed_checkpoint_is_one_state_and_no_file_beside_it(root: Path, way: str) -> None:
    folder = root / f"parts {way}" / f"checkpoint-{STEPS}"
    saved = FileSystemReader(folder / PARTS).read_metadata().state_dict_metadata
    assert {name.split(".")[0] for name in saved} == {
        "model",
        "optimizer",
        "scheduler",
        "balancing",
    }
    assert not (folder / mb.huggingface.STATE_FILE).exists()
    assert not list(folder.glob("*.safetensors"))
    assert (root / f"parts {way}" / "final" / mb.huggingface.STATE_FILE).exists()


@pytest.mark.survives(
    "Killed and resumed",
    "The last distributed checkpoint is cut off, unreadable, or lacks a file",
    "goes on: from the one before",
)
@pytest.mark.parametrize("damage", ["cut off", "missing", "unreadable", "without contents"])
def test_a_damaged_distributed_checkpoint_is_passed_over(
    root: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(root / "parts on 2", tmp_path / "run")
    parts = tmp_path / "run" / f"checkpoint-{STEPS}" / PARTS
    assert last_whole_checkpoint(tmp_path / "run") == parts.parent
    (file,) = parts.glob("__1_*.distcp")
    if damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    elif damage == "unreadable":
        (parts / ".metadata").write_bytes(b"\x80\x04cut")
    else:
        (parts / ".metadata").unlink()  # it is written last
    assert last_whole_checkpoint(tmp_path / "run").name == f"checkpoint-{SAVED}"


def test_a_recipe_on_copies_goes_on_with_a_distributed_checkpoint(root: Path) -> None:
    as_killed(root, "parts on 2", "parts to copies")
    trained(root, "parts to copies", sharded=False, resume=True)
    assert rows(root / "parts to copies") == rows(root / "parts 2 to 1")


@pytest.mark.survives(
    "Killed and resumed",
    "A sharded run resumes from a checkpoint of whole copies",
    "refused: with the reason",
)
def test_a_sharded_recipe_refuses_a_checkpoint_on_copies(root: Path) -> None:
    as_killed(root, "copies on 1", "copies to parts")
    with pytest.raises(
        ValueError, match=r"checkpoint-4 was saved by a run on whole copies.*withou"
    ):
        trained(root, "copies to parts", sharded=True, resume=True)


def test_lora_and_sharded_are_refused_together(root: Path) -> None:
    table = {
        "name": "adapter",
        "model": {"checkpoint": str(root / "parts on 2" / "final")},
        "lora": {},
        "train": {"sharded": True},
    }
    with pytest.raises(ValueError, match=r"sharded .* leave one of them out"):
        train_run(
            Recipe.parse(table, source="adapter.toml"),
            method="phi",
            seed=0,
            batching="mixed",
            folder=root / "adapter",
        )


def test_fsdp_of_accelerate_is_the_same_as_sharded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    as_killed(root, "parts on 2", "accelerate")
    trained(root, "accelerate", sharded=False, resume=True)
    assert (root / "accelerate" / f"checkpoint-{STEPS}" / PARTS).is_dir()
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert rows(root / "accelerate") == rows(root / "parts 2 to 1")


def test_fsdp1_of_accelerate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match=r"FSDP1.*fsdp_version: 2"), sharding_for_accelerate():
        pass
