"""Weights that are not plainly there: partitioned, packed, offloaded, on meta, behind a kernel."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn

import moebalance as mb
from families import tiny, tokens

BOTH = mb.Together(mb.PhiBalancing(strength=0.5), mb.LossFree(speed=0.1))
LINEAR_ROUTERS = ("gemma4_text", "afmoe", "hunyuan_v1_moe", "llama4_text", "phimoe")
"""Families whose router holds an nn.Linear, which quantisation replaces."""


def rules(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (s.num_experts, s.top_k, s.gate, s.rule, s.bias_name)
        for s in mb.huggingface.find_sites(model)
    ]


class Packed(nn.Module):
    """A linear map whose weight is bytes, as bitsandbytes and its like keep it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.true, self.bias = [linear.weight.detach()], linear.bias
        size = (linear.weight.numel() // 2, 1)
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] != 64, "quantised on the device only"  # a probe is not served
        return nn.functional.linear(x, self.true[0], self.bias)


@pytest.mark.parametrize("family", LINEAR_ROUTERS)
@pytest.mark.situation(
    "Weights",
    "Quantised routers that hold a `Linear`",
    "works",
)
def test_a_router_that_holds_a_quantised_linear_is_recognised(family: str) -> None:
    model = tiny(family)
    expected = rules(model)
    for site in mb.huggingface.find_sites(model):
        for name, linear in list(site.router.named_modules()):
            if isinstance(linear, nn.Linear):
                owner, _, leaf = name.rpartition(".")
                setattr(site.router.get_submodule(owner), leaf, Packed(linear))
    assert rules(model) == expected
    ids = tokens()
    with mb.monitor(model.eval()) as watch:
        model(input_ids=ids)
        assert watch.evaluate()["tokens"] == ids.numel()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gemma4_text", "gpt_oss"])
def test_a_rule_is_found_from_shapes_alone(family: str) -> None:
    """As ZeRO-3 leaves the weights: empty, with their shape in `ds_shape`."""
    model = tiny(family)
    expected = rules(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert rules(model) == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_forward_that_a_kernel_replaced_is_not_the_rule(family: str) -> None:
    model = tiny(family)
    expected = rules(model)
    for site in mb.huggingface.find_sites(model):

        def kernel(router: nn.Module, hidden: Tensor) -> None:
            raise RuntimeError("no GPU")

        site.router.forward = types.MethodType(kernel, site.router)
    assert rules(model) == expected


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.situation(
    "Weights",
    "A model on meta when it is attached to",
    "works: the state comes with the weights",
)
def test_a_model_on_meta_is_attached_to_and_trains_when_its_weights_come(family: str) -> None:
    """As ranks without weights are, before FSDP brings them."""
    whole, model, ids = tiny(family), tiny(family), tokens()
    bias = mb.huggingface.find_sites(whole)[0].bias
    if bias is not None:
        bias.copy_(torch.linspace(-0.4, 0.4, 8))
    rotary = model.model.rotary_emb
    balancing = mb.attach(model.to("meta"), BOTH)
    for layer in balancing.layers.values():
        assert layer.running.device.type == "cpu"
    model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict())
    model.model.rotary_emb = rotary.to_empty(device="cpu")
    model.model.rotary_emb.load_state_dict(whole.model.rotary_emb.state_dict())
    for name, buffer in whole.named_buffers():
        model.get_buffer(name).copy_(buffer)
    other = mb.attach(whole, BOTH)
    for both, handle in ((model, balancing), (whole, other)):
        both(input_ids=ids, labels=ids).loss.backward()
        handle.step()
    for name, layer in other.state_dict()["layers"].items():
        for key, tensor in layer.items():
            assert torch.equal(balancing.state_dict()["layers"][name][key], tensor), (name, key)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
@pytest.mark.situation(
    "Weights",
    "CPU or disk offload",
    "works: a monitor counts",
)
def test_an_offloaded_model_is_watched(tmp_path: Any, offload: Any) -> None:
    model, ids = tiny("mixtral").eval(), tokens()
    with mb.monitor(model) as watch:
        model(input_ids=ids)
        expected = watch.evaluate()
    where = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
    offload(model, execution_device=torch.device("cpu"), **where)
    assert model.model.layers[0].mlp.gate.weight.is_meta
    with mb.monitor(model) as watch:
        model(input_ids=ids)
        assert watch.evaluate() == expected
