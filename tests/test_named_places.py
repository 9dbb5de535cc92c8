"""`routers=` names a method that returns logits, or the parameter that a layer makes them with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moebalance as mb
from named_models import EXPERTS, WIDTH, Layer, Model, attach, combine, train


class OfParameter(Layer):
    """A gate that is a parameter, and a method that makes logits of it."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Parameter(self.gate.weight.data.T.clone())
        del self.gate

    def get_logits(self, x: Tensor) -> Tensor:
        return torch.einsum("td,de->te", x, self.wg.float())

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        return combine(self.experts, flat, *self.weigh(self.get_logits(flat))).view(x.shape)


class Transposed(OfParameter):
    """The same parameter used as people use it in `F.linear`."""

    def get_logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.wg.t().to(x.dtype))


@pytest.mark.parametrize("kind", [OfParameter, Transposed])
@pytest.mark.parametrize("name", ["*.wg", "*.get_logits"])
@pytest.mark.parametrize(
    "method",
    [mb.PhiBalancing(strength=0.5), mb.LossFree(speed=0.05)],
    ids=["phi", "loss-free"],
)
def test_a_parameter_or_a_method_learns_as_a_linear_gate_does(name, kind, method):
    torch.manual_seed(0)
    linear, other = Model(Layer(), Layer()), Model(kind(), kind(), recompute=True)
    for mine, theirs in zip(other.layers, linear.layers, strict=True):
        mine.wg.data = theirs.gate.weight.data.T.clone()
        mine.experts.load_state_dict(theirs.experts.state_dict())
    first = attach(linear, method=method, normalize=True)
    second = attach(other, name, method=method, normalize=True, num_experts=EXPERTS)
    assert list(second.layers) == [f"layers.{n}{name[1:]}" for n in (0, 1)]
    train(linear, first, batches=2, steps=5)
    train(other, second, batches=2, steps=5)
    for mine, theirs in zip(other.layers, linear.layers, strict=True):
        torch.testing.assert_close(mine.wg.T, theirs.gate.weight, rtol=0, atol=1e-6)
    assert first.metrics() == pytest.approx(second.metrics(), abs=1e-5)
    second.detach()
    x = torch.randn(2, 8, WIDTH)
    bare = Model(kind(), kind())
    bare.load_state_dict(other.state_dict())
    assert torch.equal(other(x), bare(x))
    attach(other, name, method=method, normalize=True, num_experts=EXPERTS).detach()


def test_what_a_parameter_or_a_method_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"layers\.0\.wg is a method or a parameter.*num_experts"):
        attach(Model(OfParameter()), "*.wg")
    model = Model(OfParameter())
    model.layers[0].wg.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\.0\.wg is frozen"):
        attach(model, "*.wg", num_experts=EXPERTS)
    model = Model(OfParameter())
    attach(model, "*.wg", num_experts=EXPERTS)
    with pytest.raises(ValueError, match=r"layers\.0\.wg is balanced already"):
        attach(model, "*.wg", num_experts=EXPERTS)


def test_an_exception_in_a_layer_ends_the_look_at_its_parameter():
    model = Model(OfParameter())
    balancing = attach(model, "*.wg", num_experts=EXPERTS)
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.randn(2, 5, WIDTH + 1))
    model(torch.randn(2, 5, WIDTH)).sum().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 10
