"""The end of a step: all layers at once, judged without a wait where the device is another one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cases import METHODS, random_routing, tensors
from moebalance import Balancing, LossFree, PhiBalancing, Together
from moebalance.core import step as ledger
from moebalance.core.commit import commit_rows
from moebalance.core.layer import LayerBalance
from moebalance.core.packing import pack, unpack
from moebalance.lab.bench.traffic import traffic
from moebalance.methods import observe

BOTH = Together(PhiBalancing(), LossFree())


def counted(method, sizes=(8, 8, 8), seed=0) -> Balancing:
    """A handle on layers that have each counted a batch of their own."""
    layers = {f"layer{i}": LayerBalance(method, experts) for i, experts in enumerate(sizes)}
    balancing = Balancing(method, layers)
    count(balancing, seed)
    return balancing


def count(balancing: Balancing, seed: int) -> None:
    for i, layer in enumerate(balancing.layers.values()):
        routing = random_routing(24, layer.num_experts, 2, seed=seed + i)
        layer.count(observe(layer.method, layer.state, routing))


@pytest.mark.parametrize("name", METHODS)
def test_every_layer_advances_as_it_would_alone(name):
    method = METHODS[name]
    sizes = (8, 6, 8, 8, 6)
    together, alone = counted(method, sizes), counted(method, sizes)
    for seed in (0, 10, 20):
        for layer in alone.layers.values():
            sums = unpack(layer.running.clone(), method, layer.num_experts)
            expected = method.update(layer.state, sums)
            layer._write(expected)
            layer.discard()
        together.step()
        for one, other in zip(together.layers.values(), alone.layers.values(), strict=True):
            for a, b in zip(tensors(one.state), tensors(other.state), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        count(together, seed + 10)
        count(alone, seed + 10)


def kernels(layers: int) -> tuple[list[str], list[str]]:
    """What a step of so many layers starts beside counting, and all that it starts."""
    balancing = counted(BOTH, (8,) * layers)

    def batches() -> None:
        count(balancing, 1)

    def step() -> None:
        balancing.step()
        batches()

    step()
    whole = traffic(step, rows=10**9).small
    return whole[: len(whole) - len(traffic(batches, rows=10**9).small)], whole


def test_a_step_takes_as_many_kernels_for_forty_layers_as_for_two():
    assert len(kernels(2)[0]) == len(kernels(40)[0]) <= 33


def test_a_step_reads_nothing_back_from_the_device_but_its_verdict():
    _, started = kernels(5)
    assert started.count("aten::_local_scalar_dense") <= 1
    assert "aten::nonzero" not in started


class Crossings(TorchDispatchMode):
    """Notes what is copied from one device to another: from a host to a GPU each waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            devices = {a.device for a in args if isinstance(a, torch.Tensor) and a.dim()}
            if devices - {found.device}:
                self.seen.append(str(func))
        return found


def test_nothing_is_brought_to_the_device_to_end_a_step_there():
    layers = {f"layer{i}": LayerBalance(BOTH, 8).to("meta") for i in range(3)}
    balancing = Balancing(BOTH, layers)
    with Crossings() as crossings:
        banks, flags, replayed = balancing._ledger._totals()
        for bank in banks:
            commit_rows(bank.layers, bank.sums, good=flags[0].all(), replayed=replayed)
    assert not crossings.seen
    with Crossings() as crossings:  # the control
        torch.zeros(1).to("meta")
    assert crossings.seen


@pytest.fixture
def far_device(monkeypatch):
    """Flags that arrive later, as those of a CUDA device."""
    waits = []
    event = SimpleNamespace(synchronize=lambda: waits.append(True))
    monkeypatch.setattr(ledger, "_send", lambda verdict: verdict._replace(arrived=event))
    return waits


def test_on_another_device_nan_is_kept_from_the_state_at_once_and_named_a_step_later(far_device):
    balancing = counted(BOTH)
    balancing.step()
    before = {name: [t.clone() for t in tensors(x.state)] for name, x in balancing.layers.items()}
    count(balancing, 1)
    balancing.layers["layer1"].running[0] = torch.nan
    balancing.step()
    for name, layer in balancing.layers.items():
        assert all(map(torch.equal, before[name], tensors(layer.state)))
    count(balancing, 2)
    with pytest.raises(FloatingPointError, match="in layer1 during step 2"):
        balancing.step()
    assert not any(layer.running.any() for layer in balancing.layers.values())
    count(balancing, 3)
    balancing.step()
    assert all(t.isfinite().all() for x in balancing.layers.values() for t in tensors(x.state))


def trained() -> list[torch.Tensor]:
    balancing = counted(BOTH)
    for seed in (1, 2, 3):
        balancing.step()
        count(balancing, seed)
    return [t for layer in balancing.layers.values() for t in tensors(layer.state)]


NEAR = trained()


def test_on_another_device_good_steps_advance_the_state_as_here(far_device):
    assert all(map(torch.equal, trained(), NEAR))
    assert len(far_device) == 2  # of three verdicts the last is still on its way


def test_on_another_device_a_step_without_tokens_is_named_a_step_later(far_device):
    balancing = counted(BOTH)
    balancing.step()
    balancing.step()
    count(balancing, 1)
    with pytest.raises(RuntimeError, match=r"No token was counted in layer0, .* during step 2"):
        balancing.step()


def test_sums_of_the_last_step_are_those_that_were_counted():
    balancing = counted(BOTH)
    running = {name: layer.running.clone() for name, layer in balancing.layers.items()}
    balancing.step()
    for name, layer in balancing.layers.items():
        assert layer.last_sums is not None
        assert torch.equal(pack(layer.last_sums), running[name])
