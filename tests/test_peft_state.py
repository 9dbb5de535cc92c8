"""A balancing state belongs to a router, whatever PEFT has put around it or taken away again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import moebalance as mb
from families import tiny, tokens
from moebalance.integrations.names import without_adapters

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT's own
)

ROUTER: dict[str, dict[str, Any]] = {
    "frozen": {},
    "copied": {"modules_to_save": ["gate"]},
    "adapted": {"target_parameters": ["mlp.gate.weight"]},
}
every_way = pytest.mark.parametrize("router", ROUTER.values(), ids=ROUTER)
PRICED = mb.LossFree(scale="nats", speed=0.5)  # of this family, in the state alone


def adapted(router: dict[str, Any], name: str = "default") -> PeftModel:
    config = LoraConfig(target_modules=["q_proj"], **router)
    return get_peft_model(tiny("qwen3_moe"), config, adapter_name=name)


def trained(router: dict[str, Any]) -> tuple[PeftModel, mb.Balancing]:
    model = adapted(router)
    balancing = mb.attach(model, PRICED)
    for seed in range(3):
        ids = tokens(seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()
    return model.eval(), balancing


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=tokens(seed=9)).logits


def tensors(state: dict[str, Any]) -> list[Tensor]:
    return [tensor for layer in state["layers"].values() for tensor in layer.values()]


@every_way
def test_a_state_saved_with_an_adapter_is_loaded_after_the_merge(
    tmp_path: Path, router: dict[str, Any]
) -> None:
    model, balancing = trained(router)
    mb.huggingface.save(balancing, tmp_path)
    before = outputs(model)
    balancing.detach()
    merged = model.merge_and_unload()
    again = mb.attach(merged, PRICED)
    assert not torch.allclose(outputs(merged), before)
    mb.huggingface.load(again, tmp_path)
    torch.testing.assert_close(outputs(merged), before)


@every_way
def test_a_state_saved_before_an_adapter_is_loaded_with_it(router: dict[str, Any]) -> None:
    bare = mb.attach(tiny("qwen3_moe"), PRICED)
    for layer in bare.layers.values():
        layer.adopt(torch.arange(float(layer.num_experts)))
    balancing = mb.attach(adapted(router), PRICED)
    balancing.load_state_dict(bare.state_dict())
    for mine, theirs in zip(
        tensors(balancing.state_dict()), tensors(bare.state_dict()), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_state_is_loaded_under_another_adapter_name(tmp_path: Path) -> None:
    model, balancing = trained(ROUTER["copied"])
    before = outputs(model)
    model.save_pretrained(tmp_path)
    mb.huggingface.save(balancing, tmp_path)
    again = PeftModel.from_pretrained(
        tiny("qwen3_moe"), tmp_path, is_trainable=True, adapter_name="mine"
    )
    mb.huggingface.load(mb.attach(again, PRICED), tmp_path)
    torch.testing.assert_close(outputs(again), before)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.gate = nn.Linear(4, 4), nn.Linear(4, 3)


class Own(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.router = mb.BalancedRouter(mb.LossFree(), num_experts=3, top_k=2)


def test_routers_of_ours_and_routers_that_a_user_names_are_known_again_too() -> None:
    config = LoraConfig(target_modules=["proj"], modules_to_save=["gate"])
    bare = mb.attach(Own())
    balancing = mb.attach(get_peft_model(Own(), config))
    assert_exchange(bare, balancing)
    bare = mb.attach(Plain(), mb.PhiBalancing(), routers="gate", top_k=2)
    balancing = mb.attach(
        get_peft_model(Plain(), config), mb.PhiBalancing(), routers="*.modules_to_save.*", top_k=2
    )
    assert_exchange(bare, balancing)


def assert_exchange(bare: mb.Balancing, balancing: mb.Balancing) -> None:
    assert set(balancing.layers) != set(bare.layers)
    balancing.load_state_dict(bare.state_dict())
    bare.load_state_dict(balancing.state_dict())


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("base_model.model.model.layers.1.mlp.gate.base_layer", "model.layers.1.mlp.gate"),
        ("pretrained_model.base_model.model.layers.1.gate", "pretrained_model.layers.1.gate"),
        ("layers.1.mlp.modules_to_save.mine.gate", "layers.1.mlp.gate"),
        ("base_layers.1.base_model.gate", "base_layers.1.base_model.gate"),
    ],
)
def test_only_what_an_adapter_adds_is_taken_from_a_name(name: str, bare: str) -> None:
    assert without_adapters(name) == bare


def test_two_saved_layers_that_only_an_adapter_tells_apart_are_not_confused() -> None:
    balancing = mb.attach(tiny("qwen3_moe"), PRICED)
    state = balancing.state_dict()
    layers = {f"{n}.modules_to_save.{a}": t for n, t in state["layers"].items() for a in "ab"}
    with pytest.raises(ValueError, match=r"unknown layers .*modules_to_save\.a"):
        balancing.load_state_dict({**state, "layers": layers})
