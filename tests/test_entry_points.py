"""ms-swift's and axolotl's ways in, against stand-ins of what those two offer a plugin."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import Trainer

import moebalance as mb
from families import tiny
from training import Rows, arguments, light_collections

PHI = mb.PhiBalancing(strength=0.01)
DOCS = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text("utf-8")


def documented(name: str) -> str:
    """The code block of the documentation that begins with `# name`."""
    (block,) = re.findall(rf"```\w+\n# {re.escape(name)}\n(.*?)```", DOCS, re.DOTALL)
    return block


def train(folder: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    """What each framework does in the end: a Trainer with callbacks."""
    model = tiny("gpt_oss")  # whose weights a Trainer resumes whole
    with light_collections():
        trainer = Trainer(
            model,
            arguments(folder, max_steps=2, save_strategy="steps", save_steps=1, **settings),
            train_dataset=Rows(8),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return trainer


def assert_balanced(callback: Any, method: mb.Method) -> None:
    assert callback.balancing.method == method
    assert callback.balancing.steps == 2
    assert callback.balancing.metrics()["tokens"] > 0


# --- ms-swift 4.6 -------------------------------------------------------------------------------


@pytest.fixture
def callbacks_map(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Any, Any], Any]]:
    """`swift.callbacks.callbacks_map`: from the names of `--callbacks` to what makes them."""
    module = ModuleType("swift.callbacks")
    module.callbacks_map = {}
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.callbacks", module)
    return module.callbacks_map


def command(monkeypatch: pytest.MonkeyPatch, script: str, *words: str) -> None:
    """The command line of the process that ms-swift starts."""
    monkeypatch.setattr(sys, "argv", [f"/somewhere/swift/cli/{script}.py", *words])


def test_the_swift_plugin_of_the_documentation_trains_balanced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, callbacks_map: dict[str, Any]
) -> None:
    words = ("--external_plugins", "balance.py", "--callbacks", "moebalance")
    command(monkeypatch, "sft", *words)
    exec(documented("balance.py"), {})
    args = SimpleNamespace(callbacks=["moebalance"], resume_from_checkpoint=None)
    made = [callbacks_map[name](args, "the trainer") for name in args.callbacks]
    train(tmp_path, made)
    assert_balanced(made[0], PHI)


def test_swift_resumes_from_a_folder_outside_of_its_output(
    tmp_path: Path, callbacks_map: dict[str, Any]
) -> None:
    swift = importlib.import_module("moebalance.integrations.swift")
    swift.register(PHI)
    args = SimpleNamespace(resume_from_checkpoint=None)
    whole = callbacks_map["moebalance"](args, None)
    train(tmp_path / "v0", [whole])
    args.resume_from_checkpoint = str(tmp_path / "v0" / "checkpoint-1")
    resumed = callbacks_map["moebalance"](args, None)
    train(tmp_path / "v1", [resumed], resume_from_checkpoint=args.resume_from_checkpoint)
    assert_balanced(resumed, PHI)
    for name, layer in whole.balancing.layers.items():
        for key, tensor in layer.state_dict().items():
            assert torch.equal(resumed.balancing.layers[name].state_dict()[key], tensor)


def test_a_swift_run_that_would_not_be_balanced_is_refused(
    monkeypatch: pytest.MonkeyPatch, callbacks_map: dict[str, Any]
) -> None:
    from moebalance.integrations.swift import register

    plugin = ("--external_plugins", "balance.py")
    command(monkeypatch, "rlhf", *plugin, "--callbacks", "early_stop")
    with pytest.raises(ValueError, match="add --callbacks moebalance to the command"):
        register(PHI)
    assert callbacks_map == {}
    command(monkeypatch, "rlhf", *plugin, "--callbacks", "early_stop", "moebalance")
    register(PHI)
    command(monkeypatch, "infer", *plugin)  # reads the plugin file and trains nothing
    register(mb.NoBalancing(), name="other")
    assert set(callbacks_map) == {"moebalance", "other"}


def test_registering_again_replaces_and_a_bad_method_is_refused(
    callbacks_map: dict[str, Any],
) -> None:
    from moebalance.integrations.swift import register

    register(PHI)
    register(mb.LossFree(), prefix="balance/")
    made = callbacks_map["moebalance"](SimpleNamespace(), None)
    assert made.prefix == "balance/"
    with pytest.raises(TypeError, match="give what moebalance"):
        register("phi")


# --- axolotl 0.19 -------------------------------------------------------------------------------


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> None:
    """`axolotl.integrations.base.BasePlugin`, whose methods do nothing."""
    module = ModuleType("axolotl.integrations.base")
    module.BasePlugin = type("BasePlugin", (), {"register": lambda self, cfg: None})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", module)
    monkeypatch.delitem(sys.modules, "moebalance.integrations.axolotl", raising=False)


def read_configuration(text: str) -> tuple[Any, dict[str, Any]]:
    """What axolotl does with its file: load the plugin, merge its arguments, validate, dump."""
    from pydantic import BaseModel

    raw = yaml.safe_load(text)
    (path,) = raw.pop("plugins")
    module, _, name = path.rpartition(".")
    plugin = getattr(importlib.import_module(module), name)()
    plugin.register(raw)
    module, _, name = plugin.get_input_args().rpartition(".")
    mixin = getattr(importlib.import_module(module), name)
    own = type("AxolotlInputConfigBase", (BaseModel,), {})
    merged = type("AxolotlInputConfig", (own, mixin), {})
    return plugin, merged(**raw).model_dump(exclude_none=True)


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("config.yaml", PHI),
        (
            "together.yaml",
            mb.Together(
                mb.PhiBalancing(mb.potentials.Tsallis(alpha=1.2), strength=0.01),
                mb.LossFree(speed=1e-3),
            ),
        ),
    ],
)
def test_the_axolotl_configurations_of_the_documentation_train_balanced(
    tmp_path: Path, axolotl: None, file: str, method: mb.Method
) -> None:
    plugin, cfg = read_configuration(documented(file))
    callbacks = plugin.add_callbacks_pre_trainer(cfg, model=None)
    train(tmp_path, callbacks)
    assert_balanced(callbacks[0], method)


def test_axolotl_resumes_from_a_folder_outside_of_its_output(tmp_path: Path, axolotl: None) -> None:
    plugin, cfg = read_configuration(documented("config.yaml"))
    train(tmp_path / "first", plugin.add_callbacks_pre_trainer(cfg, model=None))
    checkpoint = str(tmp_path / "first" / "checkpoint-1")
    (again,) = plugin.add_callbacks_pre_trainer({**cfg, "resume_from_checkpoint": checkpoint}, None)
    train(tmp_path / "second", [again], resume_from_checkpoint=checkpoint)
    assert_balanced(again, PHI)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, {}), ({"rl": "dpo"}, {"router_aux_loss_coef": 0.0}), ({"rl": "orpo"}, {})],
)
def test_axolotl_trainers_of_trl_are_told_to_leave_their_own_balancing_loss_out(
    axolotl: None, settings: dict[str, Any], expected: dict[str, float]
) -> None:
    plugin, cfg = read_configuration(documented("config.yaml"))
    assert plugin.get_training_args({**cfg, **settings}) == expected


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("{method: fi}", "Unknown method 'fi'"),
        ("{method: phi, strenght: 1}", "Did you mean 'strength'"),
        ("{method: phi, strength: -1}", "strength=-1"),
        ("{strength: 1}", r"moebalance\.method\n  Field required"),
        ("null", "moebalance\n"),
    ],
)
def test_a_bad_axolotl_configuration_is_refused_as_it_is_read(
    axolotl: None, table: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_configuration(
            "plugins: [moebalance.integrations.axolotl.MoebalancePlugin]\n" + f"moebalance: {table}"
        )


def test_without_axolotl_its_plugin_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "axolotl", None)
    monkeypatch.delitem(sys.modules, "moebalance.integrations.axolotl", raising=False)
    with pytest.raises(ModuleNotFoundError, match="axolotl"):
        importlib.import_module("moebalance.integrations.axolotl")


# --- LLaMA-Factory 0.9.5 ------------------------------------------------------------------------


def test_the_script_of_the_documentation_hands_llama_factory_a_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        assert args == {"stage": "sft"}
        given.extend(callbacks or [])
        train(tmp_path, given)

    module = ModuleType("llamafactory.train.tuner")
    module.run_exp = run_exp
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", module)
    (tmp_path / "sft.yaml").write_text("stage: sft")
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "sft.yaml")])
    exec(documented("train.py"), {"__name__": "__main__"})
    assert_balanced(given[0], PHI)
