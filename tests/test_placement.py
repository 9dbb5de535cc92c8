"""A router's state through meta devices, loaders and wrappers: restored or refused, never lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moebalance as mb

METHOD = mb.Together(mb.PhiBalancing(strength=0.1, rate=0.5), mb.LossFree())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 8)
        self.router = mb.BalancedRouter(METHOD, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(self.gate(x))[0].sum()


def train(model: nn.Module, steps: int = 1) -> mb.Balancing:
    balancing = mb.attach(model.train())
    for step in range(steps):
        model(torch.randn(64, 16, generator=torch.Generator().manual_seed(step))).backward()
        balancing.step()
    return balancing


@pytest.fixture(scope="module")
def saved() -> dict[str, Tensor]:
    model = Model()
    train(model, 3)
    return model.state_dict()


def emptied(saved: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    model.load_state_dict(saved)
    return model


def assigned(saved: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        model = Model()
    model.load_state_dict(saved, assign=True)
    return model


def dispatched(saved: dict[str, Tensor]) -> nn.Module:
    from accelerate import dispatch_model, init_empty_weights
    from accelerate.utils import set_module_tensor_to_device

    with init_empty_weights(include_buffers=True):
        model = Model()
    for name, value in saved.items():
        set_module_tensor_to_device(model, name, "cpu", value)
    return dispatch_model(model, {"": "cpu"})


@pytest.mark.parametrize("load", [emptied, assigned, dispatched])
def test_a_model_made_on_meta_goes_on_from_its_state(load: Callable, saved):
    model = load({name: value.clone() for name, value in saved.items()})
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert train(model).metrics()["tokens"] == 64


def test_a_rounded_state_is_refused_where_there_is_one_and_float32_again_where_there_is_none(saved):
    rounded = {k: v.bfloat16() for k, v in saved.items()}
    with pytest.raises(RuntimeError, match=r"bfloat16 .* must be a plain torch\.float32 tensor"):
        Model().load_state_dict(rounded, assign=True)
    with torch.device("meta"):
        model = Model()
    model.load_state_dict(rounded, assign=True)
    assert {buffer.dtype for buffer in model.router.buffers()} == {torch.float32}


def test_a_wrapper_that_turns_the_state_to_bfloat16_is_refused():
    """FSDP1 with MixedPrecision(buffer_dtype=torch.bfloat16) does this to every buffer."""
    model = Model()
    mb.attach(model)
    for buffer in model.router.buffers():
        buffer.data = buffer.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"MixedPrecision\(buffer_dtype=torch.float32\)"):
        model(torch.randn(4, 16))


def test_a_checkpoint_made_without_routers_loads_and_the_state_starts_anew(saved, caplog):
    bare = {name: value for name, value in saved.items() if "router" not in name}
    model = Model()
    train(model, 2)
    with caplog.at_level("INFO", "moebalance"):
        model.load_state_dict(bare)
    assert "has no state of router: it starts anew" in caplog.text
    fresh = Model().router.state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in model.router.state_dict().items())


@pytest.mark.parametrize("with_state", [True, False])
def test_from_pretrained_goes_on_from_the_state_or_starts_anew(with_state, tmp_path: Path):
    from safetensors.torch import load_file, save_file
    from transformers import PretrainedConfig, PreTrainedModel

    class Config(PretrainedConfig):
        model_type = "mine"

    class Pretrained(PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.inner = Model()
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    first = Pretrained(Config())
    train(first, 3)
    first.save_pretrained(tmp_path)
    expected = first.inner.router
    if not with_state:
        file = tmp_path / "model.safetensors"
        bare = {k: v for k, v in load_file(file).items() if "router" not in k}
        save_file(bare, file, metadata={"format": "pt"})
        expected = Model().router
    for act in (lambda model: model(torch.randn(4, 16)), train, lambda model: model.float()):
        again = Pretrained.from_pretrained(tmp_path)
        state = again.inner.router
        if act is train:
            assert train(again).metrics()["tokens"] == 64
            continue
        act(again)
        for name, value in expected.state_dict().items():
            assert torch.equal(value, state.state_dict()[name]), name
