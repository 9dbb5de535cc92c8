"""Checkpoints go both ways between a model with `BalancedRouter`s and the same one without.

And FSDP1 with mixed precision: the state stays float32, or is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moebalance as mb
from processes import run

METHOD = mb.Together(mb.PhiBalancing(strength=0.1, rate=0.5), mb.LossFree())


class Plain(nn.Module):
    """A layer as it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.out = nn.Linear(16, 8), nn.Linear(16, 16)


class Balanced(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.router = mb.BalancedRouter(METHOD, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights, _ = self.router(self.gate(x))
        return self.out(x) * weights[..., :1].to(x.dtype)


def trained(model: nn.Module, *, steps: int = 2, seed: int = 0) -> nn.Module:
    balancing = mb.attach(model)
    for step in range(steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(10 * seed + step))
        balancing.follow(model(x).square().mean()).backward()
        balancing.step()
    balancing.detach()
    return model


def fresh(router: mb.BalancedRouter) -> bool:
    new = Balanced().router.state_dict()
    return all(torch.equal(value, new[name]) for name, value in router.state_dict().items())


def by_state_dict(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    model.load_state_dict(weights, strict=True)


def by_safetensors(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import load_model, save_file

    save_file(weights, folder / "model.safetensors")
    load_model(model, folder / "model.safetensors", strict=True)


@pytest.mark.parametrize(("load", "anew"), [(by_state_dict, True), (by_safetensors, False)])
def test_a_checkpoint_made_without_us_loads_strictly_and_one_line_says_so(
    load, anew, tmp_path, caplog
):
    model, weights = trained(Balanced()), Plain().state_dict()
    assert not fresh(model.router)
    with caplog.at_level("INFO", "moebalance"):
        load(model, weights, tmp_path)
    # safetensors asks torch for parts, whatever it was asked for: the state stays.
    assert caplog.text.count("has no state of router: it starts anew") == anew
    assert fresh(model.router) == anew
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


WRAPPERS: dict[str, Any] = {
    "bare": lambda model: model,
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("load", [by_state_dict, by_safetensors])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_the_weights_alone_load_strictly_into_the_layer_as_it_was(load, wrapper, tmp_path):
    model, plain = Balanced(), Plain()
    wrapped = WRAPPERS[wrapper](model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        WRAPPERS[wrapper](Plain()).load_state_dict(wrapped.state_dict(), strict=True)
    load(WRAPPERS[wrapper](plain), mb.plain_state_dict(wrapped), tmp_path)
    assert torch.equal(plain.gate.weight, model.gate.weight)
    assert plain.state_dict().keys() == mb.plain_state_dict(wrapped, model.state_dict()).keys()


# --- two ranks --------------------------------------------------------------------------------


def through_fsdp2(folder: str) -> dict[str, Any]:
    """What is fresh, equal or refused, through every way that FSDP2 and DCP load."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    plain, model = fully_shard(Plain()), trained(fully_shard(Balanced()), seed=dist.get_rank())
    before, found = plain.gate.weight.full_tensor(), {"trained": not fresh(model.router)}
    dcp.save({"model": get_model_state_dict(plain)}, checkpoint_id=f"{folder}/plain")
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/ours")
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True)
    full = get_model_state_dict(plain, options=whole)
    for name, weights, how in (
        ("full", full, whole),
        ("sharded", get_model_state_dict(plain), StateDictOptions()),
    ):
        model = trained(fully_shard(Balanced()), seed=dist.get_rank())
        set_model_state_dict(model, weights, options=how)
        same = torch.equal(model.gate.weight.full_tensor(), before)
        found[name] = same and fresh(model.router)

    model = fully_shard(Balanced())
    asked = get_model_state_dict(model)
    partly = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load({"model": asked}, checkpoint_id=f"{folder}/plain", planner=partly)
    set_model_state_dict(model, asked)
    same = torch.equal(model.gate.weight.full_tensor(), before)
    found["dcp"] = same and fresh(model.router)

    asked = get_model_state_dict(plain)  # and back
    dcp.load({"model": asked}, checkpoint_id=f"{folder}/ours")
    set_model_state_dict(plain, asked)
    found["dcp back"] = not torch.equal(plain.gate.weight.full_tensor(), before)
    weights = mb.plain_state_dict(model, get_model_state_dict(model, options=whole))
    set_model_state_dict(plain, weights, options=whole)
    found["full back"] = torch.equal(plain.gate.weight.full_tensor(), before)
    return found | through_fsdp1()


def through_fsdp1() -> dict[str, Any]:
    """The state's dtype and price after two steps in bfloat16, or the refusal."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    found = {}
    for buffers in (torch.bfloat16, torch.float32, None):
        torch.manual_seed(0)
        model = Balanced()
        half = MixedPrecision(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, buffer_dtype=buffers
        )
        cpu = torch.device("cpu")
        wrapped = FullyShardedDataParallel(
            model, mixed_precision=half, device_id=cpu, use_orig_params=True
        )
        try:
            trained(wrapped)
            kinds = {buffer.dtype for buffer in model.router.buffers()}
            found[str(buffers)] = (kinds, model.router.price)
        except RuntimeError as error:
            found[str(buffers)] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run(through_fsdp2, 2, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("way", ["trained", "full", "sharded", "dcp"])
def test_sharded_models_take_a_checkpoint_made_without_us(ranks, way):
    assert all(rank[way] for rank in ranks)


@pytest.mark.parametrize("way", ["dcp back", "full back"])
def test_sharded_models_without_us_take_the_weights_alone(ranks, way):
    assert all(rank[way] for rank in ranks)


def test_fsdp1_keeps_the_state_in_float32_where_weights_are_bfloat16(ranks):
    for kinds, price in (rank[kind] for rank in ranks for kind in ("torch.float32", "None")):
        assert kinds == {torch.float32}
        assert price.abs().max() > 1e-3
        assert torch.equal(price, ranks[0]["None"][1])


def test_fsdp1_with_bfloat16_buffers_is_refused_on_every_rank(ranks):
    for rank in ranks:
        assert "MixedPrecision(buffer_dtype=torch.float32)" in rank["torch.bfloat16"]
