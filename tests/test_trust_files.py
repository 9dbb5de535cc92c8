"""Files from elsewhere: none of them runs code."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from cases import METHODS, OF_EIGHT
from moebalance.integrations.huggingface.contents import load_parts, read_contents
from moebalance.integrations.huggingface.sharded import PARTS
from moebalance.integrations.huggingface.state_file import STATE_FILE, read
from moebalance.lab import doctor
from moebalance.lab.checkpoints import last_whole_checkpoint
from moebalance.lab.finetune import _load
from moebalance.lab.recipe import Recipe
from moebalance.lab.text.checkpoint_tokenizer import load_checkpoint_tokenizer
from moebalance.words.reprs import method_of

CODE = """
from pathlib import Path
from transformers import PretrainedConfig
Path({mark!r}).touch()
class C(PretrainedConfig):
    model_type = "stranger"
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder that brings its own code, and a stdin that says yes to everything."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    described = {"model_type": "stranger", "auto_map": {"AutoConfig": "code.C"}}
    (folder / "config.json").write_text(json.dumps(described))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return folder


def nothing_ran(stranger: Path) -> None:
    assert not (stranger.parent / "ran").exists()
    assert sys.stdin.read() == "y\n" * 9


@pytest.mark.survives(
    "Files of strangers",
    "A model brings its own code, and stdin says yes",
    "refused: the code does not run",
)
def test_the_doctor_neither_asks_nor_runs_the_code_of_a_model_that_it_does_not_know(
    stranger: Path,
) -> None:
    with pytest.raises(ValueError, match=r"code of its own .* never runs"):
        doctor.diagnose(stranger)
    nothing_ran(stranger)


def test_fine_tuning_neither_asks_nor_runs_the_code_of_a_model_that_it_does_not_know(
    stranger: Path,
) -> None:
    save_file({"w": torch.zeros(1)}, stranger / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe.parse({"model": {"checkpoint": str(stranger)}}, source="tune.toml")
    with pytest.raises(ValueError, match=r"code of its own .* never runs"):
        _load(recipe, stranger, stranger)
    nothing_ran(stranger)


@pytest.mark.parametrize("kind", ["AutoTokenizer", "AutoConfig"])
def test_the_tokeniser_of_a_checkpoint_neither_asks_nor_runs_its_code(
    stranger: Path, kind: str
) -> None:
    described = {"auto_map": {kind: ["code.C", None]}, "tokenizer_class": "C"}
    (stranger / "tokenizer_config.json").write_text(json.dumps(described))
    (stranger / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokeniser"):
        load_checkpoint_tokenizer(stranger)
    nothing_ran(stranger)


def calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call in the library's code, by the dotted name that is called."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


CODE_FILES = [p for top in ("src", "examples", "evidence") for p in Path(top).rglob("*.py")]
SAFE = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    **{
        f"Auto{what}.{how}": ("trust_remote_code", False)
        for what in ("Config", "Tokenizer", "ModelForCausalLM")
        for how in ("from_pretrained", "from_config")
    },
}
FORBIDDEN = {"pickle.load", "pickle.loads", "eval", "exec", "FileSystemReader", "dcp.load"}


def test_no_code_of_ours_reads_a_file_that_could_run_code() -> None:
    seen = set()
    for path in CODE_FILES:
        for name, call in calls(path.read_text(encoding="utf-8")):
            assert name not in FORBIDDEN, f"{path}:{call.lineno}"
            if name in SAFE:
                seen.add(name)
                key, needed = SAFE[name]
                given = {k.arg: k.value for k in call.keywords}
                found = ast.literal_eval(given[key]) if key in given else None
                assert found is needed, f"{path}:{call.lineno} calls {name} without {key}={needed}"
    assert {"torch.load", "np.load", "AutoModelForCausalLM.from_pretrained"} <= seen


# --- Distributed checkpoints ----------------------------------------------------------------------


class Runs:
    """A pickle of it calls a function when it is read."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Holds:
    """What a checkpoint holds that is no tensor."""

    def __init__(self, value: object) -> None:
        self.value, self.loaded = value, None

    def state_dict(self) -> dict[str, object]:
        return {"value": self.value, "steps": 3, "rates": [0.5, 1], "name": "φ"}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.loaded = state


def written(folder: Path, value: object = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process is meant
        save({"model": {"w": torch.arange(6.0)}, "extra": Holds(value)}, checkpoint_id=folder)
    return folder


def taken_up(folder: Path) -> tuple[torch.Tensor, object]:
    tensor, extra = torch.zeros(6), Holds(None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_parts({"model": {"w": tensor}, "extra": extra}, folder)
    return tensor, extra.loaded


def test_a_distributed_checkpoint_of_torch_is_read_as_it_was_written(tmp_path: Path) -> None:
    tensor, loaded = taken_up(written(tmp_path / "d"))
    assert torch.equal(tensor, torch.arange(6.0))
    assert loaded == {"value": None, "steps": 3, "rates": [0.5, 1], "name": "φ"}


HOSTILE_TABLES: dict[str, Callable[[Path], object]] = {
    "a system call": lambda mark: Runs(os.system, f"touch {mark}"),
    "eval": lambda mark: Runs(eval, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Runs(open, str(mark), "w"),
    "a method of a path": lambda mark: Runs(getattr, mark, "touch"),
    "torch's own loader": lambda mark: Runs(torch.load, str(mark)),
    "within a table": lambda mark: Metadata({}, None, {0: Runs(open, str(mark), "w")}),
    "another object": lambda _: {"a": 1},
    "a place elsewhere": lambda mark: place("../ran", 0, 9),
    "a whole path": lambda mark: place("/etc/hostname", 0, 9),
    "a negative place": lambda mark: place("__0_0.distcp", -9, 9),
    "a place that is no number": lambda mark: place("__0_0.distcp", 0, "9"),
    "no places": lambda _: Metadata({}, None, None),
    "places that are none": lambda _: Metadata({}, None, {0: 3}),
}


def place(name: object, offset: object, length: object) -> Metadata:
    return Metadata({}, None, {MetadataIndex("w"): _StorageInfo(name, offset, length)})


@pytest.mark.survives(
    "Files of strangers",
    "A distributed checkpoint's table of contents calls a function",
    "refused: with the function; it is not called",
)
@pytest.mark.parametrize("case", HOSTILE_TABLES)
def test_a_table_of_contents_with_anything_that_torch_does_not_write_is_refused(
    tmp_path: Path, case: str
) -> None:
    folder, mark = written(tmp_path / "d"), tmp_path / "ran"
    hostile = pickle.dumps(HOSTILE_TABLES[case](mark))
    (folder / ".metadata").write_bytes(hostile)
    for open_it in (read_contents, taken_up):
        with pytest.raises(ValueError, match=r"\.metadata is refused: ") as refused:
            open_it(folder)
        assert str(folder) in str(refused.value)
    assert not mark.exists()


def test_a_table_of_contents_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "d")
    whole = (folder / ".metadata").read_bytes()
    for end in range(0, len(whole) - 1, 7):
        (folder / ".metadata").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="is refused: "):
            read_contents(folder)


@pytest.mark.survives(
    "Files of strangers",
    "A value in a distributed checkpoint calls a function",
    "refused: it is not called",
)
def test_a_value_in_a_distributed_checkpoint_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = written(tmp_path / "d", Runs(open, str(mark), "w"))
    mark.unlink(missing_ok=True)  # torch copies what it saves
    with pytest.raises(ValueError, match="cannot be loaded: "):
        taken_up(folder)
    assert not mark.exists()


@pytest.mark.survives(
    "Files of strangers",
    "`--resume` meets a checkpoint that would run code",
    "warned: and passed over",
)
def test_resuming_passes_over_a_checkpoint_that_would_run_code_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, mark = tmp_path / "checkpoint-2", tmp_path / "ran"
    written(checkpoint / PARTS)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    numbers = {"python": random.getstate(), "numpy": np.random.get_state()}
    torch.save({**numbers, "cpu": torch.get_rng_state()}, checkpoint / "rng_state.pth")
    assert last_whole_checkpoint(tmp_path) == checkpoint
    (checkpoint / PARTS / ".metadata").write_bytes(pickle.dumps(Runs(os.system, f"touch {mark}")))
    assert last_whole_checkpoint(tmp_path) is None
    assert "posix.system" in caplog.text
    assert not mark.exists()


# --- Balancing states -----------------------------------------------------------------------------


HOSTILE_REPRS = [
    "__import__('os').system('touch ran')",
    "Together(*[])",
    "LossFree(**{})",
    "LossFree(speed=print('x'))",
    "LossFree().traits",
    "(lambda: 0)()",
    "[LossFree() for _ in range(9)]",
    "LossFree(speed='x')",
    "PhiBalancing(" * 5000,
    "Together(" * 90 + ")" * 90,
    "\0",
    "",
]


@pytest.mark.survives(
    "Files of strangers",
    "The method in a state file is a piece of code",
    "goes on: it is read and not evaluated",
)
@pytest.mark.parametrize("text", HOSTILE_REPRS, ids=range(len(HOSTILE_REPRS)))
def test_a_method_in_a_state_file_is_read_and_never_evaluated(text: str) -> None:
    assert method_of(text) is None


@pytest.mark.parametrize("name", {**METHODS, **OF_EIGHT})
def test_the_repr_of_every_method_gives_the_method_back(name: str) -> None:
    method = {**METHODS, **OF_EIGHT}[name]
    assert method_of(repr(method)) == method


@pytest.mark.parametrize("described", ["[" * 9999, "[1]", "3", "x", "[[1, 2], 3]"])
def test_a_state_file_with_a_broken_description_is_refused_by_its_path(
    tmp_path: Path, described: str
) -> None:
    file = tmp_path / STATE_FILE
    save_file({"a/b": torch.zeros(1)}, file, metadata={"moebalance": described})
    with pytest.raises(ValueError, match="is damaged: its description") as refused:
        read(tmp_path)
    assert str(file) in str(refused.value)
