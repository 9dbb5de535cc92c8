"""`moebalance doctor` on checkpoints: biases, router weights, balancing states, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import moebalance as mb
from checkpoints import checkpoint, drop_biases, edit, saved, spread, texts, worst
from families import tiny, tokens
from moebalance.lab.doctor import Severity, diagnose


class Own(mb.methods.SwitchLoss):
    """A method of a user."""


PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # theirs


# --- Checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2", "deepseek_v4"])
def test_a_sound_checkpoint_is_said_to_be_sound(tmp_path: Path, family: str) -> None:
    # deepseek_v4 calls its biases `gate.bias` on disk.
    found = diagnose(saved(tmp_path, family, spread))
    assert texts(found, Severity.OK) == [
        "2 router weights, all finite.",
        "2 selection biases, float32, from -0.1 to 0.1.",
    ]
    assert not found.failed


def test_biases_of_0_are_a_warning(tmp_path: Path) -> None:
    assert worst(diagnose(saved(tmp_path, "deepseek_v3"))) == (
        Severity.WARNING,
        "Every selection bias is 0: never trained, or dropped on export.",
    )


def test_biases_that_are_not_in_the_files_are_an_error(tmp_path: Path) -> None:
    edit(saved(tmp_path, "deepseek_v3", spread), drop_biases)
    found = diagnose(tmp_path)
    assert found.failed
    assert "of model.layers.1.mlp.gate and 1 more is not in the files" in worst(found)[1]


@pytest.mark.parametrize("what", ["e_score_correction_bias", "weight"])
def test_values_that_are_not_finite_are_an_error(tmp_path: Path, what: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.layers.2.mlp.gate.{what}"].view(-1)[3] = float("nan")

    edit(saved(tmp_path, "deepseek_v3", spread), spoil)
    severity, text = worst(diagnose(tmp_path))
    assert severity is Severity.ERROR
    assert "of model.layers.2.mlp.gate has NaN or infinite values" in text


def test_low_precision_is_told_in_steps(tmp_path: Path) -> None:
    saved(tmp_path, "deepseek_v3", lambda bias: (spread(bias) + 14).bfloat16())
    severity, text = worst(diagnose(tmp_path))
    assert severity is Severity.WARNING
    # bfloat16 has 8 bits: steps of 2⁻⁴ from 8 to 16.
    assert text.startswith("2 selection biases are stored in bfloat16. Around 14.1 ")
    assert text.endswith("its steps are 0.062, 62 times loss-free's usual update of 0.001.")


def test_experts_out_of_reach_are_a_warning(tmp_path: Path) -> None:
    def push(bias: Tensor) -> Tensor:
        bias = bias.clone()
        bias[:3] -= 1.0  # three of eight lie a whole affinity below the rest
        return bias

    severity, text = worst(diagnose(saved(tmp_path, "glm4_moe", push)))
    assert severity is Severity.WARNING
    assert "no token can choose them (most: 3 in model.layers.1.mlp.gate)" in text
    model = mb.huggingface.find_sites(tiny("glm4_moe"))[0].router
    model.e_score_correction_bias = push(model.e_score_correction_bias)
    chosen = model(torch.randn(1000, 32))[2]
    assert chosen.min() >= 3  # and that is so


def test_biases_of_another_size_are_an_error(tmp_path: Path) -> None:
    config = saved(tmp_path, "deepseek_v3", spread) / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "n_routed_experts": 16}))
    found = diagnose(tmp_path)
    assert any("which is not the number of experts" in t for t in texts(found, Severity.ERROR))


def test_shards_are_followed_and_missed(tmp_path: Path) -> None:
    model = tiny("deepseek_v3")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "2 router weights, all finite." in texts(diagnose(tmp_path), Severity.OK)
    (tmp_path / index["model.layers.2.mlp.gate.weight"]).unlink()
    found = diagnose(tmp_path)
    assert found.failed
    assert any(
        "The index names 1 file that cannot be found" in t for t in texts(found, Severity.ERROR)
    )
    assert any("was not found in the files" in t for t in texts(found, Severity.WARNING))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, "olmoe") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        diagnose(tmp_path)


# --- With a balancing state beside them ---------------------------------------------------------


def test_a_trainers_checkpoint_is_held_against_its_balancing_state(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "deepseek_v3", mb.LossFree(speed=0.02))
    found = diagnose(folder)
    assert not found.failed
    about = f"Balanced by {mb.LossFree(speed=0.02)!r} for 2 steps"
    assert f"{about}; the state is of these routers." in texts(found, Severity.OK)

    def forget(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.gate.e_score_correction_bias"].zero_()

    edit(folder, forget)
    found = diagnose(folder)
    assert found.failed
    assert "The weights do not hold the selection price that was trained" in worst(found)[1]
    assert "for model.layers.1.mlp.gate:" in worst(found)[1]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_weights_that_a_resuming_trainer_passes_over_are_a_warning(
    tmp_path: Path, family: str
) -> None:
    folder = checkpoint(tmp_path, family, mb.PhiBalancing())
    warned = any("resume_from_checkpoint" in t for t in texts(diagnose(folder), Severity.WARNING))
    missing = tiny(family).load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert warned == bool(missing.missing_keys)
    assert warned == (family == "deepseek_v3")


def test_a_price_without_a_place_in_the_weights_is_a_warning(tmp_path: Path) -> None:
    method = mb.Together(mb.PhiBalancing(), mb.LossFree(speed=0.02))
    found = diagnose(checkpoint(tmp_path, "gpt_oss", method))
    assert "is in the balancing state only" in texts(found, Severity.WARNING)[0]
    found = diagnose(checkpoint(tmp_path / "phi", "gpt_oss", mb.PhiBalancing()))
    assert texts(found, Severity.WARNING) == []


def test_the_state_of_another_model_is_an_error(tmp_path: Path) -> None:
    folder = saved(tmp_path, "jamba")
    mb.huggingface.save(mb.attach(tiny("olmoe"), mb.PhiBalancing()), folder)
    severity, text = worst(diagnose(folder))
    assert severity is Severity.ERROR
    assert text.startswith("This balancing state belongs to another model: missing layers ")
    assert "unknown layers ['model.layers.0.mlp.gate'" in text


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        (mb.PhiBalancing(), "state_mean", -1.0),
        (mb.LossFree(), "state_price", float("nan")),
        (mb.LossFree(), "state_price", 1e9),
        (mb.LossFree(), "state_price", torch.zeros(9)),
        (mb.methods.Targeted(mb.PhiBalancing(), mb.methods.MaxVio(0.3)), "state_multiplier", 1e14),
        (mb.LossFree(), "state_price", torch.zeros(8, dtype=torch.float64)),
        (mb.LossFree(), "state_more", torch.zeros(8)),
    ],
    ids=["load", "nan", "huge", "nine experts", "multiplier", "float64", "unknown tensor"],
)
def test_the_doctor_refuses_a_state_with_the_words_of_loading_it(
    tmp_path: Path, method: mb.Method, key: str, value: float | Tensor
) -> None:
    folder = saved(tmp_path, "olmoe")
    balancing = mb.attach(tiny("olmoe"), method)
    file = mb.huggingface.save(balancing, folder)
    with safe_open(file, framework="pt") as opened:
        described = opened.metadata()
    tensors = load_file(file)
    name = f"{next(iter(balancing.layers))}/{key}"
    spoilt = value if isinstance(value, Tensor) else torch.full_like(tensors[name], value)
    save_file({**tensors, name: spoilt}, file, metadata=described)
    with pytest.raises(ValueError, match=r"refused|does not fit") as refused:
        mb.huggingface.load(balancing, folder)
    found = diagnose(folder)
    assert found.failed
    assert worst(found)[1] == str(refused.value)


def test_the_state_of_a_part_of_the_routers_is_no_error(tmp_path: Path) -> None:
    folder = saved(tmp_path, "olmoe")
    model = tiny("olmoe")
    first = [site.name for site in mb.huggingface.find_sites(model)][:1]
    mb.huggingface.save(mb.attach(model, mb.PhiBalancing(), layers=first), folder)
    found = diagnose(folder)
    assert not found.failed
    assert any("the state is of 1 of these routers" in t for t in texts(found, Severity.OK))


def test_the_state_of_a_method_that_is_not_ours_is_a_warning(tmp_path: Path) -> None:
    folder = saved(tmp_path, "olmoe")
    mb.huggingface.save(mb.attach(tiny("olmoe"), Own(strength=0.1)), folder)
    severity, text = worst(diagnose(folder))
    assert severity is Severity.WARNING
    assert "Balanced by Own(strength=0.1) for 0 steps; this is no method of moebalance" in text


# --- Adapters -----------------------------------------------------------------------------------


@PEFT
@pytest.mark.parametrize(
    ("settings", "severity", "said"),
    [
        ({}, Severity.NOTE, "leaves 2 of 2 routers frozen"),
        ({"modules_to_save": ["gate"]}, Severity.OK, "The adapter trains every router."),
        ({"target_parameters": ["gate.weight"]}, Severity.OK, "The adapter trains every router."),
    ],
    ids=["attention", "modules_to_save", "target_parameters"],
)
def test_an_adapter_says_whether_it_trains_the_routers(
    tmp_path: Path, settings: dict[str, object], severity: Severity, said: str
) -> None:
    base = saved(tmp_path / "base", "deepseek_v3", spread)
    model = get_peft_model(tiny("deepseek_v3"), LoraConfig(target_modules=["q_b_proj"], **settings))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    found = diagnose(tmp_path / "adapter")
    assert any(said in text for text in texts(found, severity))
    assert found.model == "DeepseekV3ForCausalLM (deepseek_v3)"


@PEFT
def test_an_adapter_that_lost_a_trained_price_is_an_error(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "deepseek_v3")
    for name, settings in {"lost": {}, "kept": {"modules_to_save": ["gate"]}}.items():
        model = get_peft_model(
            tiny("deepseek_v3"), LoraConfig(target_modules=["q_b_proj"], **settings)
        )
        model.peft_config["default"].base_model_name_or_path = str(base)
        balancing = mb.attach(model, mb.LossFree(speed=0.02))
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        balancing.step()
        model.save_pretrained(tmp_path / name)
        mb.huggingface.save(balancing, tmp_path / name)
    assert diagnose(tmp_path / "lost").failed
    assert not diagnose(tmp_path / "kept").failed


def test_an_adapter_whose_base_is_not_here_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "some/hub-model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="an adapter of some/hub-model, which is not a folder"):
        diagnose(tmp_path)
