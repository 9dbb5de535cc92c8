"""Where a price replaces a router's choice anyway, our pass stands in for the router's."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

import families
import moebalance as mb
from family_checks import checkpoint_activations
from moebalance import (
    LossFree,
    NoBalancing,
    PhiBalancing,
    SequenceLoss,
    Sinkhorn,
    SwitchLoss,
    Together,
    attach,
    kernels,
)
from moebalance.integrations.huggingface import instead
from moebalance.integrations.huggingface.instead import form_of
from moebalance.kernels import router as fused

RECOMMENDED = Together(PhiBalancing(strength=1.0), LossFree(scale="nats", speed=0.3))
METHODS = {
    "recommended": RECOMMENDED,
    "loss-free": LossFree(speed=0.05),
    "switch + loss-free": Together(SwitchLoss(strength=1.0), LossFree(speed=0.05)),
    "sinkhorn": Sinkhorn(),
    "phi": PhiBalancing(strength=1.0),
    "switch + phi": Together(SwitchLoss(strength=1.0), PhiBalancing(strength=0.5)),
}
STOOD_IN = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "minimax", "flint"]


def trained(family, method, *, stood_in, dtype=torch.float32, prepare=lambda model: None):
    """Sums, routers' gradients and losses of three steps, and the losses of an evaluation."""
    model = families.tiny(family).to(dtype)
    losses, counts, gradients = [], [], []
    with attach(model, method) as balancing:
        if not stood_in:
            for module in model.modules():
                vars(module).pop("forward", None)
        prepare(model)
        for step in range(3):
            loss = families.loss(model, families.tokens(seed=step))
            loss.backward()
            balancing.step()
            losses.append(loss.detach())
            counts += [layer.last_sums.counts for layer in balancing.layers.values()]
            gradients += [
                model.get_submodule(name).weight.grad.clone() for name in balancing.layers
            ]
            model.zero_grad()
        model.eval()
        with torch.no_grad():
            losses.append(families.loss(model, families.tokens(seed=9)))
    return losses, counts, gradients


def trained_and_started(family, method, **how):
    """The same, and how often each program was started."""
    started = Counter()
    launch = fused.launch

    def counted(program, *arguments):
        started[program.name] += 1
        launch(program, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "launch", counted)
        return trained(family, method, **how), dict(started)


def same(mine, theirs, **tolerance):
    for one, other in zip(mine, theirs, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("family", STOOD_IN)
def test_a_router_that_we_know_whole_is_stood_in_for(family):
    model = families.tiny(family)
    before = families.loss(model, families.tokens())
    with attach(model, RECOMMENDED) as balancing:
        routers = [model.get_submodule(name) for name in balancing.layers]
        assert all("forward" in vars(router) for router in routers)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(families.loss(model, families.tokens()), before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", STOOD_IN)
def test_it_counts_charges_and_answers_as_the_router_and_the_hook_behind_it_do(family, name):
    method = METHODS[name]
    mine = trained(family, method, stood_in=True)
    theirs = trained(family, method, stood_in=False)
    same(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["recommended", "loss-free", "phi"])
def test_the_fused_kernels_stand_in_alike(name, dtype, interpreted):
    """As on a GPU: one launch forward and one backward, instead of the router's own pass."""
    how = {"stood_in": True, "dtype": dtype}
    mine, started = interpreted(trained_and_started, "qwen3_moe", METHODS[name], **how)
    theirs = trained("qwen3_moe", METHODS[name], **how)
    # Of three steps of two layers; an evaluation is left to torch.
    assert started == {"programs.choose": 6, "programs.pull_back": 6}
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    same(mine, theirs, rtol=tolerance, atol=tolerance)


def test_the_recommended_method_sends_a_gpu_one_launch_forward_and_one_backward(monkeypatch):
    sent: list[str] = []
    monkeypatch.setattr(kernels, "supported", lambda *_: True)
    monkeypatch.setattr(fused, "launch", lambda program, *_: sent.append(program.name))
    model = families.tiny("qwen3_moe").bfloat16()
    with attach(model, RECOMMENDED) as balancing:
        router = model.get_submodule(next(iter(balancing.layers)))
        _, weights, _ = router(torch.randn(6, 32, dtype=torch.bfloat16))
        assert sent == ["programs.choose"]
        weights.backward(torch.ones_like(weights))
        assert sent == ["programs.choose", "programs.pull_back"]
        # Nothing of torch lies between the kernel and what the model gets.
        assert type(weights.grad_fn).__name__ == "_ChooseFusedBackward"


def test_bfloat16_keeps_the_dtypes_of_the_router():
    router = mb.huggingface.find_sites(families.tiny("mixtral").bfloat16())[0].router
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    expected = [each.dtype for each in router(x)]
    model = families.tiny("mixtral").bfloat16()
    with attach(model, RECOMMENDED) as balancing:
        found = model.get_submodule(next(iter(balancing.layers)))(x)
        assert [each.dtype for each in found] == expected
    mine = trained("qwen3_moe", RECOMMENDED, stood_in=True, dtype=torch.bfloat16)
    theirs = trained("qwen3_moe", RECOMMENDED, stood_in=False, dtype=torch.bfloat16)
    same(mine[:2], theirs[:2], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["recommended", "phi"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_are_counted_once(reentrant, name):
    def prepare(model):
        checkpoint_activations(model, {"use_reentrant": reentrant})
        model.enable_input_require_grads()

    plain = trained("qwen3_moe", METHODS[name], stood_in=True)
    same(trained("qwen3_moe", METHODS[name], stood_in=True, prepare=prepare), plain)


@pytest.mark.filterwarnings("ignore")  # Dynamo's, of every kind
@pytest.mark.parametrize("name", ["recommended", "phi"])
def test_a_compiled_model_is_stood_in_for_alike(name):
    torch._dynamo.reset()
    plain = trained("qwen3_moe", METHODS[name], stood_in=True)
    compiled = trained(
        "qwen3_moe",
        METHODS[name],
        stood_in=True,
        prepare=lambda model: model.compile(backend="eager", fullgraph=True),
    )
    same(compiled, plain, rtol=1e-4, atol=1e-6)


def test_a_copy_of_the_model_routes_by_its_own_weights():
    model, ids = families.tiny("qwen3_moe"), families.tokens()
    with attach(model, RECOMMENDED) as balancing:
        twin = copy.deepcopy(model)
        name = next(iter(balancing.layers))
        torch.nn.init.zeros_(model.get_submodule(name).weight)
        x = torch.randn(5, 32)
        logits, *_ = twin.get_submodule(name)(x)
        assert torch.equal(logits, x @ twin.get_submodule(name).weight.mT)
        assert logits.abs().max() > 0
    assert families.loss(model, ids).isfinite()


def test_a_call_of_forward_itself_does_not_hide_the_next_call_from_the_hook():
    """No hook runs for it; the next call may be left to the router, as Sinkhorn does."""
    model = families.tiny("qwen3_moe")
    with attach(model, Sinkhorn()) as balancing:
        name = next(iter(balancing.layers))
        router, x = model.get_submodule(name), torch.randn(6, 32)
        (hook,) = (h.__self__ for h in router._forward_hooks.values() if hasattr(h, "__self__"))
        router.forward(x)  # answered, and no hook ran
        router.eval()
        balancing.layers[name].start_watching()
        router(x)
        assert balancing.layers[name].watched.tokens == 6
        assert hook.calls == 1


@pytest.mark.parametrize("name", ["recommended", "phi"])
def test_a_hook_that_accelerate_puts_around_it_outlives_the_detach(name):
    model = families.tiny("qwen3_moe")
    router, x = mb.huggingface.find_sites(model)[0].router, torch.randn(6, 32)
    theirs = router(x)
    balancing = attach(model, METHODS[name])
    add_hook_to_module(router, AlignDevicesHook("cpu"))
    router(x)[1].sum().backward()
    balancing.step()
    balancing.detach()
    assert hasattr(router, "_hf_hook")
    assert all(map(torch.equal, router(x), theirs))


@pytest.mark.parametrize(
    ("family", "num_experts", "top_k", "width"),
    [
        ("olmoe", 64, 8, 2048),
        ("qwen2_moe", 60, 8, 3584),
        ("qwen3_moe", 128, 8, 4096),
        ("mixtral", 8, 2, 6144),
        ("flint", 64, 8, 128),
        ("flint", 64, 8, 7168),
    ],
)
def test_a_router_is_known_at_the_width_of_a_real_model(family, num_experts, top_k, width):
    """Probed with logits that grew with the width, its affinities were 0 and 1 alone."""
    model = families.tiny(family)
    router = mb.huggingface.find_sites(model)[0].router
    router.weight = torch.nn.Parameter(torch.empty(num_experts, width))
    router.num_experts, router.top_k, router.hidden_dim = num_experts, top_k, width
    assert form_of(mb.huggingface.find_sites(model)[0]).exact


def test_a_router_that_does_something_of_its_own_under_autocast_is_left_to_itself(monkeypatch):
    model = families.tiny("mixtral")
    router = type(mb.huggingface.find_sites(model)[0].router)
    whole = router.forward

    def forward(self, hidden_states):
        logits, weights, experts = whole(self, hidden_states)
        return logits + torch.is_autocast_enabled("cpu"), weights, experts

    monkeypatch.setattr(router, "forward", forward)
    assert form_of(mb.huggingface.find_sites(model)[0]) is None


@pytest.mark.parametrize("family", ["gpt_oss", "jamba", "llama4_text", "gemma4_text"])
def test_a_router_that_does_more_is_left_to_itself(family):
    assert form_of(mb.huggingface.find_sites(families.tiny(family))[0]) is None


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(8, 32).to(torch.float8_e4m3fn), torch.empty(0)],
    ids=["quantised", "partitioned"],
)
def test_a_router_whose_weight_is_not_plainly_there_is_left_to_itself(weight):
    site = mb.huggingface.find_sites(families.tiny("mixtral"))[0]
    assert form_of(site) is not None
    site.router.weight = torch.nn.Parameter(weight, requires_grad=False)
    assert form_of(site) is None


def test_a_router_whose_forward_was_replaced_is_left_to_itself():
    model = families.tiny("mixtral")
    router = mb.huggingface.find_sites(model)[0].router
    router.forward = copy.copy(router.forward)
    assert form_of(mb.huggingface.find_sites(model)[0]) is None


@pytest.mark.parametrize("method", [NoBalancing(), SequenceLoss()], ids=repr)
def test_what_charges_nothing_or_looks_at_more_than_sums_leaves_the_router_alone(method):
    model = families.tiny("mixtral")
    with attach(model, method):
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", STOOD_IN)
def test_a_method_that_only_charges_gets_the_routers_answer_to_the_bit(family, dtype, autocast):
    model = families.tiny(family).to(dtype)
    name = mb.huggingface.find_sites(model)[0].name
    router, x = model.get_submodule(name), torch.randn(2, 60, 32).to(dtype)
    x[0, 0] *= 1000  # saturated: all affinities but one are 0
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = router(x)
        with attach(model, PhiBalancing()):
            assert "forward" in vars(router)
            ours = router(x)
    assert [each.dtype for each in ours] == [each.dtype for each in theirs]
    assert all(map(torch.equal, ours, theirs))
    assert "_ChooseBackward" in nodes(ours[1])
    assert "_ChooseBackward" not in nodes(theirs[1])


def nodes(tensor):
    """Names of the nodes behind a tensor."""
    found, ahead = set(), [tensor.grad_fn]
    while ahead:
        node = ahead.pop()
        found.add(node.name())
        ahead += [before for before, _ in node.next_functions if before is not None]
    return found


def test_a_router_with_a_selection_bias_of_its_own_is_left_to_itself_by_a_charge():
    model = families.tiny("glm4_moe")
    assert not form_of(mb.huggingface.find_sites(model)[0]).exact
    with attach(model, PhiBalancing()) as balancing:
        routers = [model.get_submodule(name) for name in balancing.layers]
        assert not any("forward" in vars(router) for router in routers)


def test_evaluation_under_a_charge_is_left_to_the_router():
    model = families.tiny("qwen3_moe").eval()
    with attach(model, PhiBalancing()) as balancing:
        name = next(iter(balancing.layers))
        balancing.layers[name].start_watching()
        model.get_submodule(name)(torch.randn(6, 32))
        assert balancing.layers[name].watched.tokens == 6


def test_padding_and_a_share_of_the_step_count_as_before():
    def with_mask(stood_in):
        model, ids = families.tiny("qwen3_moe"), families.tokens()
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        with attach(model, RECOMMENDED) as balancing:
            if not stood_in:
                for module in model.modules():
                    vars(module).pop("forward", None)
            families.loss(model, ids, attention_mask=mask).backward()
            balancing.step()
            sums = [layer.last_sums for layer in balancing.layers.values()]
            weights = [model.get_submodule(n).weight.grad for n in balancing.layers]
        assert all(each.tokens == 19 for each in sums)
        return [each.counts for each in sums], weights

    same(with_mask(True), with_mask(False), rtol=1e-4, atol=1e-6)


def test_of_routers_that_are_alike_one_is_tried(monkeypatch):
    tried = []
    monkeypatch.setattr(instead, "_TRIED", {})
    monkeypatch.setattr(
        instead, "_try", lambda site, own=instead._try: tried.append(site) or own(site)
    )
    sites = [
        site
        for norm in (True, False)
        for site in mb.huggingface.find_sites(families.tiny("qwen3_moe", norm_topk_prob=norm))
    ]
    forms = [form_of(site) for site in sites]
    assert len(sites) == 4
    assert len(tried) == 2  # the two kinds, which weigh otherwise
    assert all(form is not None for form in forms)
