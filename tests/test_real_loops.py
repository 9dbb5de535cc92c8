"""Loops and wrappers as people have them: each of these was once wrong in silence, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import moebalance as mb
from cases import tensors
from named_models import EXPERTS, TOP_K, WIDTH, Layer, Model, attach, padded
from processes import run

BOTH = mb.Together(mb.PhiBalancing(), mb.LossFree(speed=0.1))


class Routed(nn.Module):
    """A gate, and a router of ours."""

    def __init__(self, method: mb.Method = BOTH) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.router = mb.BalancedRouter(method, EXPERTS, TOP_K)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(self.gate(x))[0]


def trained(steps: int = 3) -> tuple[Routed, mb.Balancing]:
    torch.manual_seed(0)
    model = Routed()
    balancing = mb.attach(model)
    for _ in range(steps):
        model(torch.randn(32, WIDTH)).square().mean().backward()
        balancing.step()
    return model, balancing


def test_a_part_of_a_checkpoint_leaves_the_state_alone():
    """As an average of the weights that is swapped in by hand, or an adapter."""
    model, _ = trained()
    before = [tensor.clone() for tensor in tensors(model.router.state)]
    model.load_state_dict({"gate.weight": torch.zeros(EXPERTS, WIDTH)}, strict=False)
    assert all(map(torch.equal, before, tensors(model.router.state)))
    model.load_state_dict({"gate.weight": torch.zeros(EXPERTS, WIDTH)})  # whole, and without one
    assert not any(map(torch.equal, before, tensors(model.router.state)))


class Wrapper(nn.Module):
    """Hands its arguments on, as data parallelism and DeepSpeed do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.module(*inputs, **kwargs)


@pytest.mark.parametrize("wrapper", [Wrapper, lambda model: Wrapper(Wrapper(model))])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_mask_is_read_behind_a_wrapper_however_it_is_given(wrapper, by_name):
    model = wrapper(Model(Layer()))
    balancing = attach(model, mask="mask")
    x, mask = padded()
    out = model(x, mask=mask) if by_name else model(x, mask)
    out.square().mean().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == mask.sum()
    with pytest.raises(ValueError, match=r"no such argument; it has x, mask"):
        attach(wrapper(Model(Layer())), mask="attention_mask")


def test_named_routers_that_were_attached_to_on_meta_train_like_others():
    with torch.device("meta"):
        late = Model(Layer())
    balancing = attach(late, method=mb.PhiBalancing(strength=1.0))
    late.to_empty(device="cpu")
    torch.manual_seed(0)
    plain = Model(Layer())
    late.load_state_dict(plain.state_dict())
    for model, handle in ((late, balancing), (plain, attach(plain, method=balancing.method))):
        for seed in range(2):
            torch.manual_seed(seed)
            model(torch.randn(4, 16, WIDTH)).square().mean().backward()
            handle.step()
    assert torch.equal(late.layers[0].gate.weight.grad, plain.layers[0].gate.weight.grad)


def test_a_router_made_on_meta_takes_its_first_state_as_fsdp1_asks():
    with torch.device("meta"):
        late = mb.BalancedRouter(BOTH, EXPERTS, TOP_K)
    late.to_empty(device="cpu", recurse=False)
    late.reset_parameters()
    fresh = mb.BalancedRouter(BOTH, EXPERTS, TOP_K)
    assert all(map(torch.equal, tensors(late.state), tensors(fresh.state)))
    assert not late.running.any()


def test_the_state_is_float32_where_constructors_give_another_dtype(monkeypatch):
    """`deepspeed.zero.Init` turns what torch's constructors make to the model's dtype."""
    for name in ("zeros", "ones", "full"):
        made = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **k: made(*a, **k).bfloat16())
    model = Routed()
    monkeypatch.undo()
    router = model.router
    cells = [*router.buffers(), router.running, router.loss_scale, router.replayed]
    assert {cell.dtype for cell in cells} == {torch.float32}
    balancing = mb.attach(model)
    model(torch.randn(32, WIDTH)).square().mean().backward()
    balancing.step()


def test_a_model_attached_to_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        router = mb.BalancedRouter(BOTH, EXPERTS, TOP_K)
        balancing = mb.attach(router)
    router(torch.randn(8, EXPERTS, requires_grad=True))[0].sum().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 8


@pytest.mark.parametrize("group", ["dp", [0, 1]])
def test_something_else_than_a_process_group_is_refused_at_once(group):
    with pytest.raises(TypeError, match=r'mesh\["dp"\].get_group\(\)'):
        mb.attach(Routed(), group=group)


@pytest.mark.parametrize("first", [True, False])
def test_a_loss_of_weight_zero_switches_the_term_off(first):
    model = Routed(mb.PhiBalancing(strength=1.0))
    balancing = mb.attach(model)
    if not first:
        balancing.follow(model(torch.randn(32, WIDTH)).square().mean()).backward()
    model.zero_grad()
    (0.0 * balancing.follow(model(torch.randn(32, WIDTH)).square().mean())).backward()
    assert not model.gate.weight.grad.any()


def end_in_the_optimizers_hook() -> Tensor:
    """Ragged micro-batches, and a step that ends in a hook of the optimizer."""
    torch.manual_seed(0)
    model = Routed(mb.LossFree(speed=0.1))
    balancing = mb.attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: balancing.step())
    for _ in range(3):
        for _ in range(1 + dist.get_rank()):
            model(torch.randn(32, WIDTH)).square().mean().backward()
        optimizer.step()
    return model.router.price.clone()


def test_a_step_may_end_in_a_hook_of_the_optimizer_with_ragged_batches():
    first, second = run(end_in_the_optimizers_hook, 2)
    assert torch.equal(first, second)
    assert first.any()
