"""Where the balancing state lives, how it is saved and taken up, and the handle that steps it."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cases import METHODS, commit, plain_top_k, tensors
from families import tiny
from moebalance import (
    BalancedRouter,
    Balancing,
    LossFree,
    PhiBalancing,
    Softmax,
    SwitchLoss,
    Together,
    attach,
    metrics,
)
from moebalance.core.layer import LayerBalance
from moebalance.routing import measure, route
from tiny_moe import (
    EXPERTS,
    PHI,
    TOP_K,
    TinyMoE,
    close,
    explicit,
    gradients,
    handle,
    hidden,
    same,
    warm,
)

# --- where the state lives --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["phi-negative-entropy", "phi-and-loss-free", "quantile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_the_model_to_another_dtype_leaves_state_and_sums_float32(name, dtype):
    model = TinyMoE(METHODS[name])
    balancing = warm(model)
    before = [t.clone() for t in tensors(model.router.state)]
    model.to(dtype)
    kept = [*tensors(model.router.state), model.router.running, model.router.last_step]
    assert {tensor.dtype for tensor in kept} == {torch.float32}
    assert same(tensors(model.router.state), before)

    model(hidden(16).to(dtype)).float().mean().backward()
    balancing.step()
    assert {tensor.dtype for tensor in tensors(model.router.state)} == {torch.float32}
    assert model.gate.grad.dtype == dtype


def test_half_bfloat16_and_double_leave_the_state_float32():
    for move in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        router = move(BalancedRouter(Together(PHI, LossFree()), EXPERTS, TOP_K))
        assert all(tensor.dtype == torch.float32 for tensor in router.buffers())


def test_a_router_built_under_another_default_dtype_keeps_float32_state():
    torch.set_default_dtype(torch.bfloat16)
    try:
        router = BalancedRouter(Together(PHI, LossFree()), EXPERTS, TOP_K)
    finally:
        torch.set_default_dtype(torch.float32)
    kept = [*router.buffers(), router.running, router.loss_scale]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def test_a_double_model_trains():
    model = TinyMoE().double()
    balancing = handle(model)
    x = hidden(16).double()
    found = gradients(model, model(x).mean())
    close(found, explicit(model, x), 1e-7)
    balancing.step()


def test_a_router_made_on_the_meta_device_starts_afresh_on_a_real_one():
    with torch.device("meta"):
        router = BalancedRouter(Together(PHI, LossFree()), EXPERTS, TOP_K)
    router.to_empty(device="cpu")
    fresh = BalancedRouter(Together(PHI, LossFree()), EXPERTS, TOP_K)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(router.state_dict()[name], tensor)
    router(torch.randn(5, EXPERTS, requires_grad=True))[0].sum().backward()
    assert router.running[2 * EXPERTS] == 5


def test_running_sums_are_neither_buffers_nor_saved():
    model = TinyMoE()
    model(hidden(16)).mean().backward()
    running = model.router.running
    assert all(buffer.data_ptr() != running.data_ptr() for buffer in model.buffers())
    assert set(model.router.state_dict()) == {"state_mean", "state_weight", "last_step"}


def test_a_copied_model_balances_on_its_own():
    model = TinyMoE()
    warm(model)
    twin = copy.deepcopy(model)
    assert same(list(twin.buffers()), list(model.buffers()))
    before = [buffer.clone() for buffer in model.buffers()]
    twin(hidden(16)).mean().backward()
    assert not model.router.running.any()
    commit(twin.router)
    assert same(list(model.buffers()), before)
    assert not same(list(twin.buffers()), before)


def test_a_pickled_model_balances_on():
    model = TinyMoE(Together(PHI, LossFree()))
    warm(model)
    twin = pickle.loads(pickle.dumps(model))
    for each in (model, twin):
        each(hidden(16)).mean().backward()
        commit(each.router)
    assert same(twin.router.state, model.router.state)


def test_the_models_own_checkpoint_carries_the_state():
    model, other = TinyMoE(), TinyMoE(seed=1)
    warm(model)
    other.load_state_dict(model.state_dict())
    assert same(list(other.buffers()), list(model.buffers()))


@pytest.mark.parametrize("name", METHODS)
def test_interrupted_training_is_uninterrupted_training_bit_for_bit(name):
    def train(model, balancing, steps):
        optimizer = torch.optim.SGD([model.gate, model.experts], lr=0.1)
        for step in steps:
            for half in hidden(2, 8, seed=step):
                (balancing.follow(model(half).mean()) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            balancing.step()

    through = TinyMoE(METHODS[name])
    whole = handle(through)
    train(through, whole, range(4))

    first = TinyMoE(METHODS[name])
    before = handle(first)
    train(first, before, range(2))
    saved = copy.deepcopy(before.state_dict())
    second = TinyMoE(METHODS[name], seed=9)
    with torch.no_grad():
        second.gate.copy_(first.gate)
        second.experts.copy_(first.experts)
    after = handle(second)
    after.load_state_dict(saved)
    assert after.steps == 2
    train(second, after, range(2, 4))

    assert torch.equal(second.gate, through.gate)
    assert same(list(second.router.buffers()), list(through.router.buffers()))
    assert after.state_dict()["steps"] == whole.state_dict()["steps"] == 4


def test_a_saved_state_is_a_snapshot():
    model = TinyMoE()
    balancing = warm(model)
    saved = balancing.state_dict()
    frozen = copy.deepcopy(saved)
    model(hidden(16)).mean().backward()
    balancing.step()
    assert same(list(saved["layers"]["router"].values()), list(frozen["layers"]["router"].values()))


def test_loading_forgets_what_was_counted_since():
    model = TinyMoE()
    balancing = warm(model)
    saved = balancing.state_dict()
    model(hidden(16)).mean().backward()
    balancing.load_state_dict(saved)
    assert not model.router.running.any()


def two_layers(method=PHI, experts=EXPERTS, names=("a", "b")):
    return Balancing(method, {name: LayerBalance(method, experts, name=name) for name in names})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(format=99), "format 99"),
        (lambda s: s.pop("layers"), "'layers'"),
        (lambda s: s.pop("format"), "'format'"),
        (lambda s: s.update(two_layers(SwitchLoss()).state_dict()), "SwitchLoss"),
        (lambda s: s.update(two_layers(Together(PHI, LossFree())).state_dict()), "Together"),
        (lambda s: s.update(two_layers(names=("a", "c")).state_dict()), "'b'.*'c'"),
        (lambda s: s.update(two_layers(experts=8).state_dict()), "does not fit a"),
    ],
    ids=["format", "no-layers", "no-format", "method", "composition", "layers", "experts"],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, words):
    balancing = two_layers()
    for layer in balancing.layers.values():
        layer.count(measure(plain_top_k(hidden(8)[:, :EXPERTS], TOP_K)))
    balancing.step()
    before = copy.deepcopy(balancing.state_dict())
    bad = two_layers().state_dict()
    change(bad)
    with pytest.raises(ValueError, match=words):
        balancing.load_state_dict(bad)
    after = balancing.state_dict()
    assert after["steps"] == before["steps"] == 1
    for name in ("a", "b"):
        assert same(list(after["layers"][name].values()), list(before["layers"][name].values()))


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Held(nn.Module):
    """A model that calls a part of its own `module`, as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.module = TinyMoE(PHI)


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "data parallel": DataParallel,
    "compiled": torch.compile,
    "FSDP1": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "recomputed": checkpoint_wrapper,
    "compiled and DDP": lambda model: DistributedDataParallel(torch.compile(model)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", [TinyMoE, lambda _: Held()], ids=["", "own module"])
def test_a_wrapped_model_has_the_layer_names_of_the_bare_one(wrapper, model, alone):
    bare = attach(model(PHI))
    wrapped = attach(WRAPPERS[wrapper](model(PHI)))
    assert list(wrapped.layers) == list(bare.layers)
    assert [layer.name for layer in wrapped.layers.values()] == list(bare.layers)
    wrapped.load_state_dict(bare.state_dict())
    bare.load_state_dict(wrapped.state_dict())


def test_a_wrapped_part_of_a_model_has_the_name_it_had():
    model = nn.ModuleDict({"module": nn.ModuleList([checkpoint_wrapper(TinyMoE(PHI))])})
    assert list(attach(model).layers) == ["module.0.router"]


def test_a_transformers_model_in_ddp_has_the_layer_names_of_the_bare_one(alone):
    bare = attach(tiny("mixtral"), PHI)
    wrapped = attach(DistributedDataParallel(tiny("mixtral")), PHI)
    assert list(wrapped.layers) == list(bare.layers)
    wrapped.load_state_dict(bare.state_dict())


def test_other_hyper_parameters_of_the_same_method_are_continued_with_a_warning(caplog):
    balancing = two_layers(PhiBalancing(strength=0.2))
    with caplog.at_level(logging.WARNING, "moebalance"):
        balancing.load_state_dict(two_layers(PHI).state_dict())
    assert "strength=0.1" in caplog.text
    assert "strength=0.2" in caplog.text


# --- the handle -------------------------------------------------------------------------------


def test_a_step_without_tokens_is_refused():
    balancing = two_layers()
    with pytest.raises(RuntimeError, match=r"in a, b during step 1\b"):
        balancing.step()
    assert balancing.steps == 0


@pytest.mark.survives(
    "Numbers",
    "One layer counts no token",
    "warned: once; the others advance",
)
def test_one_disabled_layer_does_not_block_the_rest(caplog):
    balancing = two_layers()
    for _ in range(2):
        balancing.layers["a"].count(measure(plain_top_k(hidden(8)[:, :EXPERTS], TOP_K)))
        with caplog.at_level(logging.WARNING, "moebalance"):
            balancing.step()
    fresh = two_layers().state_dict()["layers"]["b"]
    after = balancing.state_dict()["layers"]
    assert balancing.steps == 2
    assert same(list(after["b"].values()), list(fresh.values()))
    assert not same(list(after["a"].values()), list(fresh.values()))
    assert [r.message for r in caplog.records] == [
        "moebalance: b counted no token in step 1 and keeps its state. If it should take part, see "
        "that its layer trains."
    ]


@pytest.mark.survives(
    "Numbers",
    "NaN or infinite logits in one process",
    "error: with layer and step",
)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_bad_logits_are_refused_by_layer_and_step_and_do_no_harm(poison):
    model = TinyMoE()
    balancing = warm(model)
    before = [buffer.clone() for buffer in model.buffers()]
    x = hidden(16)
    x[3] = poison
    model(x).mean().backward()
    with pytest.raises(FloatingPointError, match=r"in router during step 3\b"):
        balancing.step()
    assert same(list(model.buffers()), before)
    model.zero_grad()
    model(hidden(16)).mean().backward()
    balancing.step()
    assert balancing.steps == 3
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())


def test_metrics_are_those_of_the_last_step_by_hand():
    a, b = LayerBalance(LossFree(speed=0.5), 4), LayerBalance(LossFree(speed=0.5), 4)
    balancing = Balancing(a.method, {"a": a, "b": b})
    assert balancing.metrics() == {}
    assert balancing.loads() == {}
    # Layer a: counts 3, 3, 1, 1 of four tokens and top-2; layer b: 4, 2, 2, 0.
    chosen = {"a": [[0, 1], [0, 1], [0, 1], [2, 3]], "b": [[0, 1], [0, 1], [0, 2], [0, 2]]}
    for name, layer in balancing.layers.items():
        layer.count(measure(route(torch.zeros(4, 4), torch.tensor(chosen[name]), Softmax())))
    balancing.step()

    def entropy(counts):
        return -sum(c / 8 * math.log(c / 8) for c in counts if c) / math.log(4)

    expected = {
        "maxvio": (0.5 + 1.0) / 2,
        "maxvio_worst": 1.0,
        "minvio": (0.5 + 1.0) / 2,
        "cv": (0.5 + math.sqrt(0.5)) / 2,
        "gini": (0.25 + 0.375) / 2,
        "entropy": (entropy([3, 3, 1, 1]) + entropy([4, 2, 2, 0])) / 2,
        "dead": (0 + 0.25) / 2,
        "soft_maxvio": 0.0,
        "soft_hard_gap": (0.25 + 0.25) / 2,
        "price_spread": 1.0,
        "tokens": 4.0,
    }
    assert balancing.metrics() == pytest.approx(expected, abs=1e-6)
    hard, soft = balancing.loads()["b"]
    assert hard.tolist() == [0.5, 0.25, 0.25, 0]
    assert soft.tolist() == [0.25] * 4


def test_methods_without_selection_price_report_no_price_spread():
    model = TinyMoE()
    assert "price_spread" not in warm(model).metrics()


def test_the_first_step_says_once_what_is_balanced_and_how(caplog):
    model = TinyMoE()
    with caplog.at_level(logging.INFO, "moebalance"):
        balancing = warm(model)
    (record,) = [r for r in caplog.records if r.name == "moebalance"]
    message = record.getMessage()
    assert repr(PHI) in message
    assert "1 routers (first: 4 experts, Softmax())" in message
    assert "16 tokens" in message
    assert f"MaxVio {metrics.max_violation(first_load()).item():.2f}" in message
    assert repr(balancing) == f"Balancing({PHI!r}, layers=1, steps=2)"


def first_load():
    model = TinyMoE()
    return measure(plain_top_k((hidden(16, seed=50) @ model.gate.mT).detach(), TOP_K)).counts
