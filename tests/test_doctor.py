"""`moebalance doctor`: what it sees in a model type, a configuration, a checkpoint, an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

import moebalance as mb
from families import COMMON, EXPECTED, tiny, tokens
from moebalance.integrations.huggingface import find_sites
from moebalance.integrations.huggingface.doctor import Diagnosis, Severity, diagnose, render
from training import Rows, arguments, light_collections

PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # theirs


def texts(diagnosis: Diagnosis, severity: Severity) -> list[str]:
    return [finding.text for finding in diagnosis.findings if finding.severity is severity]


def worst(diagnosis: Diagnosis) -> tuple[Severity, str]:
    return diagnosis.findings[0].severity, diagnosis.findings[0].text


def saved(folder: Path, family: str, biases: Callable[[Tensor], Tensor] | None = None) -> Path:
    """A checkpoint of a tiny model, its selection biases made by `biases` from zeros."""
    model = tiny(family)
    for site in find_sites(model):
        if biases is not None and site.bias is not None:
            site.bias.data = biases(site.bias.data)
    model.save_pretrained(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spread(bias: Tensor) -> Tensor:
    return bias + torch.linspace(-0.1, 0.1, bias.numel()).view_as(bias)


# --- Models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", COMMON)
def test_every_family_is_read_from_its_configuration_alone(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    found = diagnose(tmp_path / "config.json")
    assert found.model == f"{type(model).__name__} ({model.config.model_type})"
    assert sum(group.count for group in found.routers) == EXPECTED[family].routers
    for group in found.routers:
        assert group.num_experts == EXPECTED[family].num_experts
        assert group.top_k == EXPECTED[family].top_k
    assert not found.failed
    biased = any(site.bias is not None for site in find_sites(model))
    assert all(group.selection.startswith("native") == biased for group in found.routers)


def test_a_model_type_stands_for_its_default_configuration_and_no_weight_is_made() -> None:
    # 671 billion parameters: the test would not come back otherwise.
    (group,) = diagnose("deepseek_v3").routers
    assert (group.count, group.num_experts, group.top_k) == (58, 256, 8)
    assert group.where == "model.layers.{3–60}.mlp.gate"
    assert group.weights == (
        "2.5 × sigmoid, divided by the sum over the chosen; the choice is limited by groups"
    )
    assert group.selection == "native: gate.e_score_correction_bias, kept in float32"


def test_a_bias_that_loses_precision_with_the_model_is_pointed_out() -> None:
    found = diagnose("minimax_m2")
    assert found.routers[0].selection == "native: e_score_correction_bias, in the model's dtype"
    assert any("3.9 times loss-free's usual update" in t for t in texts(found, Severity.NOTE))
    assert not any("model's dtype" in t for t in texts(diagnose("glm4_moe"), Severity.NOTE))


def test_a_family_without_a_bias_is_told_what_that_means_for_export() -> None:
    notes = texts(diagnose("qwen3_moe"), Severity.NOTE)
    assert any("does not leave with save_pretrained" in note for note in notes)


def test_routers_that_moebalance_refuses_are_an_error() -> None:
    found = diagnose("longcat_flash")
    assert found.failed
    assert found.routers == ()
    assert "some of its experts compute nothing" in worst(found)[1]


def test_a_dense_model_is_an_error() -> None:
    found = diagnose("llama")
    assert found.failed
    assert worst(found) == (Severity.ERROR, "LlamaForCausalLM has no MoE router.")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("qwen3_mo", "Did you mean qwen3_moe"),
        ("some/hub-model", "download its config.json first"),
        ("dbrx", r"cannot build DbrxForCausalLM .* give a config\.json"),
    ],
)
def test_a_target_that_is_nothing_is_refused_with_a_way_on(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(target)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither config\.json nor adapter_config\.json"):
        diagnose(tmp_path)


# --- Balancing that is there already ------------------------------------------------------------


def active(diagnosis: Diagnosis) -> dict[str, bool]:
    return {use.trainer.split()[0]: use.active for use in diagnosis.trainers}


def test_trl_switches_the_own_loss_on_and_the_others_leave_it_off() -> None:
    found = active(diagnose("qwen3_moe"))
    assert found == {
        "Trainer": False,
        "TRL": True,
        "axolotl": False,
        "ms-swift": False,
        "LLaMA-Factory": False,
    }


def test_a_loss_that_is_switched_on_in_the_configuration_is_active(tmp_path: Path) -> None:
    tiny("mixtral", output_router_logits=True, router_aux_loss_coef=0.7).config.save_pretrained(
        tmp_path
    )
    found = diagnose(tmp_path)
    assert active(found) == {
        "Trainer": True,
        "TRL": True,
        "axolotl": True,
        "ms-swift": False,  # sets the coefficient to its own argument, 0 by default
        "LLaMA-Factory": True,
    }
    assert found.trainers[0].why == "output_router_logits is on, router_aux_loss_coef = 0.7"


def test_a_switch_that_nothing_comes_of_is_a_warning(tmp_path: Path) -> None:
    tiny("glm4_moe", output_router_logits=True).config.save_pretrained(tmp_path)
    found = diagnose(tmp_path)
    assert not any(active(found).values())
    assert worst(found)[0] is Severity.WARNING
    assert "computes no balancing loss from it" in worst(found)[1]


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "jetmoe", "hy_v3", "llama4_text"])
def test_a_loss_is_reported_exactly_where_the_model_computes_one(
    tmp_path: Path, family: str
) -> None:
    model, ids = tiny(family, output_router_logits=True), tokens()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    computed = getattr(model(input_ids=ids, labels=ids), "aux_loss", None) is not None
    assert active(diagnose(tmp_path))["Trainer"] == computed


def test_llama_factory_ignores_its_own_setting_for_families_off_its_list() -> None:
    by_name = {use.trainer.split()[0]: use.why for use in diagnose("gpt_oss").trainers}
    assert by_name["LLaMA-Factory"].endswith("this family is not on its list")
    by_name = {use.trainer.split()[0]: use.why for use in diagnose("olmoe").trainers}
    assert by_name["LLaMA-Factory"] == "unless moe_aux_loss_coef is given"


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


def drop_biases(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "correction" in key]:
        del tensors[key]


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
        "The index names 1 files that are not there" in t for t in texts(found, Severity.ERROR)
    )
    assert any("was not found in the files" in t for t in texts(found, Severity.WARNING))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path, "olmoe") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        diagnose(tmp_path)


# --- With a balancing state beside them ---------------------------------------------------------


def checkpoint(folder: Path, family: str, balancer: mb.Balancer) -> Path:
    """What a Trainer leaves after two steps."""
    callback = mb.huggingface.BalanceCallback(balancer)
    settings = arguments(folder, max_steps=2, save_strategy="steps", save_steps=2)
    with light_collections():
        Trainer(tiny(family), settings, train_dataset=Rows(8), callbacks=[callback]).train()
    return folder / "checkpoint-2"


def test_a_trainers_checkpoint_is_held_against_its_balancing_state(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "deepseek_v3", mb.LossFree(rate=0.02))
    found = diagnose(folder)
    assert not found.failed
    about = "Balanced by LossFree(rate=0.02, rule='sign', recentre=False) for 2 steps"
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
    balancer = mb.Together(mb.PhiBalancing(), mb.LossFree(rate=0.02))
    found = diagnose(checkpoint(tmp_path, "gpt_oss", balancer))
    assert "is in the balancing state only" in texts(found, Severity.WARNING)[0]
    found = diagnose(checkpoint(tmp_path / "phi", "gpt_oss", mb.PhiBalancing()))
    assert texts(found, Severity.WARNING) == []


def test_the_state_of_another_model_is_an_error(tmp_path: Path) -> None:
    folder = saved(tmp_path, "jamba")
    mb.huggingface.save(mb.attach(tiny("olmoe"), mb.PhiBalancing()), folder)
    severity, text = worst(diagnose(folder))
    assert severity is Severity.ERROR
    assert "the state is of other routers (model.layers.0.mlp.gate and 1 more)" in text


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
        balancing = mb.attach(model, mb.LossFree(rate=0.02))
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


# --- Text ---------------------------------------------------------------------------------------


def test_the_text_says_everything_and_keeps_its_width() -> None:
    found = diagnose("qwen3_moe")
    text = render(found, width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    flat = " ".join(text.split())
    for finding in found.findings:
        assert " ".join(finding.text.split()) in flat
        assert finding.remedy in flat
    for use in found.trainers:
        assert use.trainer in text
        assert use.why in flat
    assert "24 routers: model.layers.{0–23}.mlp.gate (Qwen3MoeTopKRouter)" in text


def documented(target: str) -> str:
    """What the documentation shows of a call."""
    page = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text("utf-8")
    (shown,) = re.findall(rf"\$ moebalance doctor {re.escape(target)}\n(.*?)\n```", page, re.DOTALL)
    return shown


def test_the_documentation_shows_what_is_printed(tmp_path: Path) -> None:
    assert documented("minimax_m2") == render(diagnose("minimax_m2"))
    both = mb.Together(mb.PhiBalancing(), mb.LossFree(rate=0.02))
    folder = checkpoint(tmp_path, "deepseek_v3", both)
    edit(folder, drop_biases)
    assert documented("runs/checkpoint-2") == render(diagnose(folder))
