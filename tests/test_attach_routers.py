"""`attach(model, method, routers=…)`: a model whose routers are plain modules, no line changed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moebalance as mb
from moebalance.gates import Gate
from named_models import EXPERTS, TOP_K, WIDTH, Layer, Model, attach, combine, padded, train


class Ours(Layer):
    """The same with a `BalancedRouter`: the reference."""

    def __init__(self, method: mb.Method, gate: Gate | None = None, *, normalize: bool = True):
        super().__init__(gate, normalize=normalize)
        self.router = mb.BalancedRouter(
            method, EXPERTS, TOP_K, gate=gate or mb.Softmax(), normalize=normalize
        )

    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(logits)


def pair(method: mb.Method, gate: Gate | None = None, *, normalize: bool = True, **more: Any):
    torch.manual_seed(0)
    ours = Model(*[Ours(method, gate, normalize=normalize) for _ in range(2)], **more)
    plain = Model(*[Layer(gate, normalize=normalize) for _ in range(2)], **more)
    weights = {k: v for k, v in ours.state_dict().items() if ".router." not in k}
    plain.load_state_dict(weights)
    first = mb.attach(ours)
    second = mb.attach(plain, method, routers="*.gate", top_k=TOP_K, gate=gate, normalize=normalize)
    return (ours, first), (plain, second)


def apart(first: nn.Module, second: nn.Module) -> float:
    own = dict(first.named_parameters())
    return max((own[n] - p).abs().max().item() for n, p in second.named_parameters())


CHARGING = {
    "phi-soft": mb.PhiBalancing(strength=0.5),
    "phi-hard": mb.PhiBalancing(strength=0.5, load="hard"),
    "switch": mb.SwitchLoss(0.5),
    "phi-and-z-loss": mb.Together(mb.PhiBalancing(strength=0.5), mb.ZLoss(1e-3)),
}
WAYS = {"plain": (1, False), "accumulation": (2, False), "checkpointing": (2, True)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHARGING)
def test_a_named_linear_gate_learns_as_a_balanced_router_does(name, way):
    batches, recompute = WAYS[way]
    (ours, first), (plain, second) = pair(CHARGING[name], recompute=recompute)
    train(ours, first, batches=batches)
    train(plain, second, batches=batches)
    assert apart(ours, plain) <= 1e-6
    assert first.metrics() == pytest.approx(second.metrics(), abs=1e-6)
    second.detach()
    torch.manual_seed(0)
    bare = Model(Layer(), Layer())
    bare.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, WIDTH)
    assert torch.equal(bare(x), plain(x))


@pytest.mark.parametrize(
    ("gate", "normalize"),
    [(None, True), (mb.Sigmoid(), True), (mb.Sigmoid(), False)],
    ids=["softmax-normalised", "sigmoid-normalised", "sigmoid"],
)
@pytest.mark.parametrize(
    "method",
    [
        mb.LossFree(speed=0.05),
        mb.LossFree(scale="nats"),
        mb.Together(mb.PhiBalancing(strength=0.5), mb.LossFree(speed=0.05)),
    ],
    ids=["affinity", "nats", "with-phi"],
)
def test_a_method_that_selects_changes_the_choice_and_no_weight(method, gate, normalize):
    (ours, first), (plain, second) = pair(method, gate, normalize=normalize)
    train(ours, first, batches=2)
    train(plain, second, batches=2)
    assert apart(ours, plain) <= 1e-6
    assert first.metrics() == pytest.approx(second.metrics(), abs=1e-5)
    x = torch.randn(2, 8, WIDTH)
    torch.testing.assert_close(ours.eval()(x), plain.eval()(x))


def test_a_choice_that_would_change_the_weights_is_refused_with_the_way_out():
    for normalize, said in ((None, "say normalize=True"), (False, "would change these weights")):
        with pytest.raises(ValueError, match=rf"(?s){said}.*BalancedRouter"):
            mb.attach(Model(Layer()), mb.LossFree(), routers="*.gate", top_k=2, normalize=normalize)


def test_softmax_weights_over_all_experts_are_charged_too():
    (ours, first), (plain, second) = pair(CHARGING["phi-soft"], normalize=False)
    train(ours, first, batches=1)
    train(plain, second, batches=1)
    assert apart(ours, plain) <= 1e-6


# --- which modules ----------------------------------------------------------------------------


def test_routers_are_named_by_pattern_name_module_or_function():
    model = Model(Layer(), Layer())
    names = ["layers.0.gate", "layers.1.gate"]
    for routers in ("*.gate", names, [model.layers[0].gate, names[1]], lambda n: n in names):
        with attach(model, routers) as balancing:
            assert list(balancing.layers) == names
    with attach(model, [names[1]]) as balancing:
        assert list(balancing.layers) == names[1:]


def frozen() -> Model:
    model = Model(Layer())
    model.layers[0].gate.requires_grad_(False)
    return model


class Wide(Layer):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 32)


REFUSED = {
    "nothing": (Layer, "*.gate", {}, r"names none of the model's .*'gate'"),
    "a name that is missing": (lambda: Model(Layer()), ["*.gate", "x"], {}, "'x' names none"),
    "no names": (lambda: Model(Layer()), [], {}, "names none"),
    "no logits": (lambda: Model(Layer()), "*.1", {}, "neither out_features nor a weight"),
    "two sizes": (lambda: Model(Wide()), "*gate*", {}, "8 outputs and .*gate_proj with 32"),
    "nested": (lambda: Model(Layer()), ["*.gate", "layers.0"], {"num_experts": 8}, "inside of it"),
    "frozen": (frozen, "*.gate", {}, "gate is frozen"),
    "top_k beyond E": (lambda: Model(Layer()), "*.gate", {"top_k": 9}, "must lie in 1..num"),
    "no top_k": (lambda: Model(Layer()), "*.gate", {"top_k": None}, "also give top_k"),
    "other E": (lambda: Model(Layer()), "*.gate", {"num_experts": 4}, "8 outputs, but num_ex"),
    "no such mask": (lambda: Model(Layer()), "*.gate", {"mask": "pad"}, "no such argument"),
    "layers too": (lambda: Model(Layer()), "*.gate", {"layers": "*"}, "routers= alone"),
    "limit": (lambda: Model(Layer()), "*.gate", {"limit": mb.GroupLimit(3, 1)}, "equal groups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_router_is_refused_with_the_reason(case):
    make, routers, more, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        attach(make(), routers, **more)


def test_what_is_of_another_kind_is_refused():
    for routers, more in ((3, {}), (nn.Linear(2, 2), {}), ("*.gate", {"gate": "softmax"})):
        with pytest.raises(TypeError, match=r"routers=|gate="):
            attach(Model(Layer()), routers, **more)


def test_a_model_with_linear_gates_is_told_of_the_argument():
    with pytest.raises(ValueError, match=r'routers="\*\.gate", top_k=2.*layers\.0\.gate looks'):
        mb.attach(Model(Layer()))
    with pytest.raises(ValueError, match=r"top_k= describes the modules that routers= names"):
        mb.attach(Model(Layer()), mb.PhiBalancing(), top_k=2)


def test_a_second_attachment_and_a_compiled_model_are_refused():
    model = Model(Layer())
    attach(model)
    with pytest.raises(ValueError, match=r"layers\.0\.gate is balanced already"):
        attach(model)
    with pytest.raises(ValueError, match="attach first, then compile"):
        attach(torch.compile(Model(Layer()), backend="eager"))


class Tupled(nn.Module):
    """A router module of its own, which returns logits and more."""

    def __init__(self):
        super().__init__()
        self.map = nn.Parameter(torch.randn(WIDTH, EXPERTS))

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x @ self.map, "more"


class WithTuple(Layer):
    def __init__(self):
        super().__init__()
        self.gate = Tupled()

    def forward(self, x: Tensor) -> Tensor:
        logits, more = self.gate(x.reshape(-1, WIDTH))
        assert more == "more"
        flat = x.reshape(-1, WIDTH)
        return combine(self.experts, flat, *self.weigh(logits)).view(x.shape)


def test_a_tuple_whose_first_tensor_is_the_logits_will_do():
    model = Model(WithTuple())
    with pytest.raises(ValueError, match="also give num_experts"):
        attach(model)
    balancing = attach(model, num_experts=EXPERTS)
    model(torch.randn(2, 5, WIDTH)).sum().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 10


def test_a_module_that_returns_something_else_is_refused_at_its_first_call():
    model = Model(Layer())
    attach(model, ["layers.0.experts.0"], num_experts=4)
    with pytest.raises(ValueError, match=r"layers\.0\.experts\.0 returned \(\d+, 16\)"):
        model(torch.randn(2, 5, WIDTH))


# --- what the first gradient tells ------------------------------------------------------------


def first_words(caplog: Any, layer: Layer, **more: Any) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    balancing = attach(model, "*.gate", **more)
    with caplog.at_level(logging.WARNING, "moebalance"):
        (model(torch.randn(64, WIDTH)) * torch.randn(64, WIDTH)).sum().backward()
    balancing.step()
    return caplog.text


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gate", [mb.Softmax(), mb.Sigmoid()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_right_description_is_taken_in_silence(caplog, gate, top_k, normalize):
    layer = Layer(gate, normalize=normalize, top_k=top_k)
    assert not first_words(caplog, layer, top_k=top_k, gate=gate)


def test_a_wrong_top_k_is_noticed(caplog):
    assert "2 experts of a token get a gradient, and top_k=4" in first_words(
        caplog, Layer(), top_k=4
    )


def test_a_wrong_gate_is_noticed(caplog):
    assert "is not Softmax()" in first_words(caplog, Layer(mb.Sigmoid()))
    caplog.clear()
    assert "is Softmax, not Sigmoid()" in first_words(caplog, Layer(), gate=mb.Sigmoid())


def test_a_choice_of_the_layers_own_is_noticed(caplog):
    class Noisy(Layer):
        def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
            return super().weigh(logits + 3 * torch.randn_like(logits))

    assert "other experts than the top-k of its logits" in first_words(caplog, Noisy())


# --- where it runs ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_compiled_model_counts_and_charges_as_an_eager_one():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Model(Dense())
        with attach(model, mask="mask") as balancing:
            whole = {"backend": "aot_eager", "fullgraph": True}
            run = torch.compile(model, **whole) if compiled else model
            x, mask = padded()
            balancing.follow(run(x, mask).square().mean()).backward()
            balancing.step()
            found.append((model.layers[0].gate.weight.grad, balancing.metrics()))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_count_and_charge_compiles_in_one_graph():
    balance = mb.CountAndCharge(mb.PhiBalancing(strength=1.0), EXPERTS)
    logits = torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(0))
    found = []
    for run in (balance, torch.compile(balance, backend="aot_eager", fullgraph=True)):
        z = logits.clone().requires_grad_()
        run(z, logits.topk(2).indices).square().sum().backward()
        found.append(z.grad)
    torch.testing.assert_close(*found)


class Dense(Layer):
    """Every expert on every token: shapes do not depend on the choice."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.weigh(self.gate(x))
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        index = chosen.unsqueeze(-1).expand(*chosen.shape, WIDTH)
        return (every.gather(-2, index) * weights.unsqueeze(-1)).sum(dim=-2)


def test_state_is_saved_by_the_handle_and_not_in_the_model():
    model = Model(Layer())
    keys = set(model.state_dict())
    balancing = attach(model)
    train(model, balancing, batches=1, steps=3)
    assert set(model.state_dict()) == keys
    saved = balancing.state_dict()
    balancing.detach()
    other = attach(model)
    other.load_state_dict(saved)
    assert other.steps == 3


def test_half_precision_logits_are_counted_in_float32():
    model = Model(Layer()).bfloat16()
    balancing = attach(model)
    model(torch.randn(2, 8, WIDTH, dtype=torch.bfloat16)).sum().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 16


def test_evaluation_is_watched_and_never_counted():
    model = Model(Layer()).eval()
    balancing = attach(model)
    balancing.watch()
    model(torch.randn(2, 8, WIDTH))
    assert balancing.evaluation()[0]["tokens"] == 16
    with pytest.raises(RuntimeError, match="No token was counted"):
        balancing.step()
