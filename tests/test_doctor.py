"""`moebalance doctor` on models: routers, levers, balancing that is there already, and its text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import moebalance as mb
from checkpoints import checkpoint, drop_biases, edit, texts, worst
from families import COMMON, EXPECTED, tiny, tokens
from moebalance.lab.doctor import Diagnosis, Severity, diagnose, render

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
    biased = any(site.bias is not None for site in mb.huggingface.find_sites(model))
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


def test_routers_that_moebalance_refuses_are_an_error(tmp_path: Path) -> None:
    # Without is_moe, its default, a Doge is a dense model.
    (tmp_path / "config.json").write_text('{"model_type": "doge", "is_moe": true}')
    found = diagnose(tmp_path / "config.json")
    assert found.failed
    assert found.routers == ()
    assert "product keys" in worst(found)[1]


@pytest.mark.parametrize("family", ["longcat_flash", "zaya"])
def test_experts_that_compute_nothing_need_shares(family: str) -> None:
    found = diagnose(family)
    assert not found.failed
    (warning,) = [f for f in found.findings if f.severity is Severity.WARNING]
    assert "equal use of all would" in warning.what
    assert "a method without shares is refused" in warning.do


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


@pytest.mark.parametrize("value", [3, [3], "Qwen3MoeForCausalLM"])
def test_architectures_that_are_no_list_of_names_are_refused_by_the_file(
    tmp_path: Path, value: object
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "qwen3_moe", "architectures": value}))
    with pytest.raises(ValueError, match=r"architectures=.*must be a list of names") as told:
        diagnose(str(file))
    assert str(file) in str(told.value)


def test_a_folder_that_holds_neither_model_nor_runs_is_refused_for_what_it_is(
    tmp_path: Path,
) -> None:
    for content in ("is an empty folder", r"has no config\.json"):
        with pytest.raises(ValueError, match=rf"{content}.*adapter_config\.json.*log\.jsonl"):
            diagnose(tmp_path)
        (tmp_path / "notes.txt").touch()


def test_a_recipe_is_called_a_recipe_and_any_other_file_by_what_is_possible(
    tmp_path: Path,
) -> None:
    recipe, text = tmp_path / "mine.toml", tmp_path / "notes.txt"
    recipe.touch()
    text.touch()
    with pytest.raises(ValueError, match=r"mine\.toml is a recipe.*moebalance train"):
        diagnose(recipe)
    with pytest.raises(ValueError, match=r"neither a config\.json, nor a run log"):
        diagnose(text)


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


# --- Text ---------------------------------------------------------------------------------------


def test_the_text_says_everything_and_keeps_its_width() -> None:
    found = diagnose("qwen3_moe")
    text = render(found, width=80)
    assert max(len(line) for line in text.splitlines()) <= 80
    flat = " ".join(text.split())
    for finding in found.findings:
        assert " ".join(finding.what.split()) in flat
        assert finding.do in flat
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
    both = mb.Together(mb.PhiBalancing(), mb.LossFree(speed=0.02))
    folder = checkpoint(tmp_path, "deepseek_v3", both)
    edit(folder, drop_biases)
    assert documented("runs/checkpoint-2") == render(diagnose(folder))
