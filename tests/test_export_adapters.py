"""The price leaves with an adapter, or with the model that it was merged into; or it is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

import moebalance as mb
from families import tiny
from test_export import loaded, outputs, step, warnings_of

PEFT = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # theirs
pytestmark = PEFT

ROUTER: dict[str, dict[str, Any]] = {
    "frozen": {},
    "copied": {"modules_to_save": ["gate"]},
    "adapted": {"target_parameters": ["mlp.gate.weight"]},
}
every_way = pytest.mark.parametrize("router", ROUTER.values(), ids=ROUTER)


def adapted(name: str = "default", **settings: Any) -> tuple[PeftModel, mb.Balancing]:
    config = LoraConfig(target_modules=["q_b_proj"], **settings)
    model = get_peft_model(tiny("deepseek_v3"), config, adapter_name=name)
    balancing = mb.attach(model, mb.LossFree(speed=0.02))
    step(model, balancing, 3)
    return model, balancing


def test_an_adapter_that_leaves_the_price_in_the_base_model_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, balancing = adapted()
    with pytest.raises(ValueError, match="An adapter holds what it trains: merge it"):
        mb.huggingface.export(model, balancing, tmp_path)
    with caplog.at_level(logging.WARNING, "moebalance"):
        model.save_pretrained(tmp_path)
    (message,) = warnings_of(caplog)
    assert "is not among what would be saved" in message
    assert not any("correction" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_merging_the_adapter_keeps_the_price(tmp_path: Path) -> None:
    model, balancing = adapted()
    before = outputs(model)
    balancing.detach(keep_price=True)
    model.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(loaded(tmp_path)), before)
    assert any(bool(site.bias.any()) for site in mb.huggingface.find_sites(loaded(tmp_path)))


def test_an_adapter_that_saves_the_router_saves_the_price(tmp_path: Path) -> None:
    model, balancing = adapted(modules_to_save=["gate"])
    before = outputs(model)
    mb.huggingface.export(model, balancing, tmp_path)
    again = PeftModel.from_pretrained(tiny("deepseek_v3"), tmp_path).eval()
    assert torch.equal(outputs(again), before)


@every_way
def test_a_merged_model_is_exported_with_the_price(tmp_path: Path, router: dict[str, Any]) -> None:
    model, balancing = adapted(**router)
    before = outputs(model)
    merged = model.merge_and_unload()
    mb.huggingface.export(merged, balancing, tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(outputs(again), outputs(merged))
    torch.testing.assert_close(outputs(again), before)
    assert all(bool(site.bias.any()) for site in mb.huggingface.find_sites(again))
    assert not any(module._forward_hooks for module in merged.modules())


@every_way
def test_a_merged_model_keeps_its_balancing(router: dict[str, Any]) -> None:
    model, balancing = adapted(**router)
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    step(merged, balancing, 1)
    biases = [site.bias for site in mb.huggingface.find_sites(merged)]
    prices = [layer.price for layer in balancing.layers.values()]
    for bias, price in zip(biases, prices, strict=True):
        assert torch.equal(bias, -price)
    balancing.detach()
    assert not any(bool(bias.any()) for bias in biases)


def natively_adapted(**settings: Any) -> tuple[PreTrainedModel, mb.Balancing]:
    """Transformers' own PEFT, which puts the adapter into the model and nothing around it."""
    model = tiny("deepseek_v3")
    model.add_adapter(LoraConfig(target_modules=["q_b_proj"], **settings))
    balancing = mb.attach(model, mb.LossFree(speed=0.02))
    step(model, balancing, 3)
    return model, balancing


@pytest.mark.parametrize("router", ["frozen", "adapted"])
def test_a_native_adapter_that_leaves_the_price_behind_is_refused_and_nothing_is_done(
    tmp_path: Path, router: str
) -> None:
    model, balancing = natively_adapted(**ROUTER[router])
    before = outputs(model)
    with pytest.raises(ValueError, match="name the router in modules_to_save"):
        mb.huggingface.export(model, balancing, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(outputs(model), before)
    step(model, balancing, 1)  # attached still


def test_a_native_adapter_that_saves_the_router_saves_the_price(tmp_path: Path) -> None:
    model, balancing = natively_adapted(**ROUTER["copied"])
    before = outputs(model)
    mb.huggingface.export(model, balancing, tmp_path)
    again = tiny("deepseek_v3")
    again.load_adapter(tmp_path)
    assert torch.equal(outputs(again.eval()), before)


@pytest.mark.parametrize("name", ["mine", "7"])
def test_an_adapter_of_another_name_saves_the_price(tmp_path: Path, name: str) -> None:
    """PEFT gives it a folder of its own."""
    model, balancing = adapted(name, **ROUTER["copied"])
    before = outputs(model)
    mb.huggingface.export(model, balancing, tmp_path)
    again = PeftModel.from_pretrained(tiny("deepseek_v3"), tmp_path / name).eval()
    assert torch.equal(outputs(again), before)
