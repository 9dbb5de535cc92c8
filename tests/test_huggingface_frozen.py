"""Only what trains is balanced: frozen layers, adapters not in use, teachers, and `layers=`."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moebalance as mb
from families import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

METHODS = {
    "phi": mb.PhiBalancing(strength=0.5),
    "loss-free": mb.LossFree(speed=0.1),
    "together": mb.Together(mb.PhiBalancing(strength=0.5), mb.LossFree(speed=0.1)),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@each_method
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.situation(
    "Frozen",
    "Some routers are frozen",
    "works: they are left out, and one line says how many",
)
def test_a_frozen_router_is_left_out_with_one_line(
    family: str, method: mb.Method, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny(family, num_hidden_layers=4), tokens()
    frozen = model.model.layers[2]
    frozen.requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in frozen.state_dict().items()}
    balancing = mb.attach(model, method)
    assert "model.layers.2.mlp.gate" not in balancing.layers
    (line,) = warnings_of(caplog)
    assert f"left out 1 of {len(balancing.layers) + 1} routers" in line
    assert "model.layers.2.mlp.gate" in line
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()
    assert balancing.metrics()["tokens"] == ids.numel()
    for key, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.situation(
    "Frozen",
    "All routers are frozen",
    "refused: the method works through their gradient",
)
def test_all_frozen_is_refused_as_one_frozen_model() -> None:
    model = tiny("mixtral")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate is frozen"):
        mb.attach(model, mb.PhiBalancing())
    assert len(mb.attach(model, mb.LossFree()).layers) == 2


class Distilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = tiny("qwen3_moe")
        self.teacher = tiny("mixtral").eval().requires_grad_(False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            taught = self.teacher(input_ids=ids).logits
        own = self.student(input_ids=ids).logits
        return (own - taught).square().mean(), taught


@each_method
@pytest.mark.parametrize("attention_only", [False, True])
@pytest.mark.situation(
    "Frozen",
    "A frozen teacher in one module with its student",
    "works: the student alone is balanced",
)
def test_a_frozen_teacher_is_left_as_it_is(method: mb.Method, attention_only: bool) -> None:
    both, ids = Distilled(), tokens()
    if attention_only:
        both.student.requires_grad_(False)
        both.student.model.layers[0].self_attn.requires_grad_(True)
        if method.traits.charges:
            with pytest.raises(ValueError, match=r"student.*is frozen"):
                mb.attach(both, method)
            return
    before = both(ids)[1]
    balancing = mb.attach(both, method)
    assert {name.partition(".")[0] for name in balancing.layers} == {"student"}
    for _ in range(3):
        both(ids)[0].backward()
        balancing.step()
    assert torch.equal(both(ids)[1], before)
    assert balancing.metrics()["tokens"] == ids.numel()


def adapted(**settings: object) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj"], **settings)
    model = get_peft_model(tiny("mixtral"), config)
    model.add_adapter("ref", config)
    model.set_adapter("default")
    return model.train()


@each_method
@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["gate"]}, {"target_parameters": ["mlp.gate.weight"]}],
    ids=["saved", "adapted"],
)
@pytest.mark.situation(
    "Frozen",
    "A second LoRA adapter, such as the reference of DPO",
    "works: it is left out",
)
def test_a_second_adapter_is_neither_refused_nor_balanced(
    settings: dict[str, object], method: mb.Method, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = adapted(**settings), tokens()
    caplog.clear()
    balancing = mb.attach(model, method)
    assert len(balancing.layers) == 2
    assert not any(".ref" in name for name in balancing.layers)
    lines = warnings_of(caplog)
    assert len(lines) == ("modules_to_save" in settings)
    assert all("2 of adapters that are not active" in line for line in lines)
    model(input_ids=ids, labels=ids).loss.backward()
    model.set_adapter("ref")
    with torch.no_grad():
        model(input_ids=ids)
    model.set_adapter("default")
    balancing.step()
    assert balancing.metrics()["tokens"] == ids.numel()


@pytest.mark.parametrize(
    "layers",
    ["model.layers.0.*", ["*.0.*"], lambda name: ".0." in name],
    ids=["pattern", "patterns", "function"],
)
def test_layers_chooses_by_name(layers: object) -> None:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing(), layers=layers)
    assert list(balancing.layers) == ["model.layers.0.mlp.gate"]
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == ids.numel()


def test_layers_leaves_out_a_router_that_is_not_understood() -> None:
    class OddRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.top_k = nn.Parameter(torch.randn(8, 32)), 2

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = hidden @ self.weight.T
            values, experts = logits.topk(2)
            return logits, values.tanh(), experts

    model = tiny("mixtral")
    model.model.layers[1].mlp.gate = OddRouter()
    with pytest.raises(ValueError, match=r"OddRouter.*attach\(…, layers="):
        mb.attach(model, mb.PhiBalancing())
    assert len(mb.attach(model, mb.PhiBalancing(), layers="*.0.*").layers) == 1


def test_a_layer_pattern_without_a_router_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'\*\.9\.\*' chooses none .* 2 routers"):
        mb.attach(tiny("mixtral"), mb.PhiBalancing(), layers=["*.0.*", "*.9.*"])


def test_a_monitor_watches_frozen_routers_too() -> None:
    model, ids = tiny("mixtral"), tokens()
    model.model.layers[0].requires_grad_(False)
    with mb.monitor(model.eval()) as watch:
        model(input_ids=ids)
        assert len(watch.balancing.layers) == 2
        assert watch.evaluate()["tokens"] == ids.numel()
