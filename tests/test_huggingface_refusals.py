"""Attaching to Transformers models: what is refused, and what of the model is switched off."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import moebalance as mb
from families import tiny, tokens


def test_an_active_native_loss_is_switched_off_with_one_line_and_restored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = tiny("mixtral", output_router_logits=True, router_aux_loss_coef=0.7), tokens()
    with caplog.at_level(logging.WARNING, "moebalance"):
        balancing = mb.attach(model, mb.NoBalancing())
    assert [r.message for r in caplog.records] == [
        "moebalance: switched off MixtralForCausalLM's own balancing loss (output_router_logits="
        "True, router_aux_loss_coef=0.7); detach() switches it on again."
    ]
    assert model(input_ids=ids, labels=ids).aux_loss is None
    balancing.detach()
    assert model(input_ids=ids, labels=ids).aux_loss is not None


def test_a_model_without_routers_is_refused() -> None:
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE router"):
        mb.attach(transformers.LlamaForCausalLM(config), mb.PhiBalancing())


def test_an_old_release_of_transformers_is_named_with_the_one_that_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moebalance.integrations.huggingface import hooks, probe, release

    with pytest.raises(ImportError, match=r"Transformers 4\.57\.1 is installed.* 5\.0 or newer"):
        release.check("4.57.1")
    release.check("5.0.0")
    told = release.hint("5.6.0")
    assert "Transformers 5.6.0 is installed" in told
    assert "transformers>=5.23" in told
    assert release.hint("5.23.0") == release.hint("5.24.0") == ""
    for module in (hooks, probe):
        monkeypatch.setattr(module, "hint", lambda: told)
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(ValueError, match=r"no MoE router.*take transformers>=5\.23"):
        mb.attach(transformers.LlamaForCausalLM(config), mb.PhiBalancing())
    model = tiny("mixtral")
    model.model.layers[0].mlp.gate.weight = nn.Parameter(torch.randn(8, 5))
    with pytest.raises(ValueError, match=r"gate \(MixtralTopKRouter\).*take transformers>=5\.23"):
        mb.attach(model, mb.PhiBalancing())


def test_a_second_attachment_is_refused() -> None:
    model = tiny("mixtral")
    mb.attach(model, mb.PhiBalancing())
    with pytest.raises(ValueError, match="balanced already"):
        mb.attach(model, mb.LossFree())


def test_a_compiled_model_is_refused() -> None:
    model = tiny("mixtral")
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match="attach first, then compile"):
        mb.attach(model, mb.PhiBalancing())


def test_a_model_whose_forward_is_compiled_is_refused_and_one_kept_from_it_is_not() -> None:
    model = tiny("mixtral")
    block = model.model.layers[1].mlp
    own = block.forward
    block.forward = torch.compile(own, backend="eager")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp is compiled already"):
        mb.attach(model, mb.PhiBalancing())
    block.forward = torch.compiler.disable(own)
    mb.attach(model, mb.PhiBalancing()).detach()


def test_a_frozen_router_is_refused_only_where_its_gradient_is_needed() -> None:
    model = tiny("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate is frozen"):
        mb.attach(model, mb.PhiBalancing())
    mb.attach(model, mb.LossFree()).detach()


def test_a_group_limited_router_without_a_bias_refuses_selection_methods() -> None:
    model = tiny("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=1)
    with pytest.raises(ValueError, match="limits the choice by groups"):
        mb.attach(model, mb.LossFree())
    ids = tokens()
    with mb.attach(model, mb.PhiBalancing()) as balancing:
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()


def test_an_unknown_rule_is_refused_by_name() -> None:
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
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.gate \(OddRouter\) is a router of a kind"
    ):
        mb.attach(model, mb.PhiBalancing())


def test_more_chosen_experts_than_there_are_is_refused() -> None:
    model = tiny("mixtral")
    model.model.layers[0].mlp.gate.top_k = 9
    with pytest.raises(ValueError, match="9 of 8 experts"):
        mb.attach(model, mb.PhiBalancing())


def test_nan_logits_name_the_layer_and_the_step_and_leave_the_state() -> None:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    before = balancing.state_dict()
    with torch.no_grad():
        good = model.model.layers[1].mlp.gate.weight.clone()
        model.model.layers[1].mlp.gate.weight[3] = torch.nan
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1\.mlp\.gate during step 2"):
        balancing.step()
    after = balancing.state_dict()
    for name, layer in before["layers"].items():
        assert all(torch.equal(layer[key], after["layers"][name][key]) for key in layer)
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.copy_(good)
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    assert balancing.steps == 2


def test_an_empty_step_of_padding_only_is_refused() -> None:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    model(input_ids=ids, attention_mask=torch.zeros_like(ids), labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match="at least one real token"):
        balancing.step()


def test_what_is_neither_transformers_nor_ours_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BalancedRouter.*moebalance\.integrations\.megatron"):
        mb.attach(nn.Linear(2, 2), mb.PhiBalancing())
    with pytest.raises(TypeError, match="torch module"):
        mb.attach("mixtral", mb.PhiBalancing())
    with pytest.raises(TypeError, match="must be a Method"):
        mb.attach(tiny("mixtral"), "phi")


def test_a_native_loss_asked_for_in_the_call_is_not_added() -> None:
    model, ids = tiny("mixtral"), tokens()
    mb.attach(model, mb.NoBalancing())
    assert model(input_ids=ids, labels=ids, output_router_logits=True).aux_loss is None


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
def test_a_router_adapted_by_lora_is_balanced_and_a_frozen_one_refused() -> None:
    import peft

    ids = tokens()
    frozen = peft.get_peft_model(
        tiny("mixtral"), peft.LoraConfig(r=2, target_modules=["q_proj"])
    ).train()
    with pytest.raises(ValueError, match="is frozen"):
        mb.attach(frozen, mb.PhiBalancing())
    adapted = peft.get_peft_model(
        tiny("mixtral"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]),
    ).train()
    balancing = mb.attach(adapted, mb.PhiBalancing(strength=0.5))
    (3 * adapted(input_ids=ids, labels=ids).loss).backward()
    assert {layer.loss_scale.item() for layer in balancing.layers.values()} == {3.0}
    balancing.step()
    assert balancing.metrics()["tokens"] == ids.numel()


class MoEGate(nn.Module):
    """As the remote code of DeepSeek-V2 and its kin: experts first, then weights, no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.weight = 2, nn.Parameter(torch.randn(8, 16) / 4)

    def forward(self, hidden: Tensor) -> Any:
        scores = nn.functional.linear(hidden.flatten(0, -2), self.weight).sigmoid()
        weights, experts = scores.topk(self.top_k, dim=-1)
        return experts, weights / weights.sum(-1, keepdim=True), None


class Remote(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self) -> None:
        super().__init__(transformers.PretrainedConfig())
        self.gate = MoEGate()
        self.post_init()

    def forward(self, hidden: Tensor) -> Any:
        return self.gate(hidden)[1].sum()


def test_remote_code_whose_gate_returns_no_logits_is_balanced_by_its_weight_as_told() -> None:
    model = Remote().train()
    said = r"attach\(…, routers=\['gate\.weight'\], num_experts=…, top_k=…, gate=…\)"
    with pytest.raises(ValueError, match=said):
        mb.attach(model, mb.PhiBalancing())
    method = mb.SwitchLoss(strength=1.0)
    rule = {"num_experts": 8, "top_k": 2, "gate": mb.Sigmoid(), "normalize": True}
    balancing = mb.attach(model, method, routers=["gate.weight"], **rule)
    hidden = torch.randn(2, 5, 16)
    (0 * model(hidden)).backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 10
    logits = (hidden.flatten(0, 1) @ model.gate.weight.detach().T).requires_grad_()
    alone = mb.BalancedRouter(method, 8, 2, gate=mb.Sigmoid())
    (0 * alone(logits)[0].sum()).backward()
    expected = logits.grad.T @ hidden.flatten(0, 1)
    torch.testing.assert_close(model.gate.weight.grad, expected)
