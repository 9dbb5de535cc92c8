"""Attaching to Transformers models: the promises kept, on every family of `families.py`."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moebalance as mb
from families import COMMON, tiny, tokens

SIGMOID = {"deepseek_v3", "glm4_moe"}
NATIVE_BIAS = {"deepseek_v3", "glm4_moe", "ernie4_5_moe"}
each_family = pytest.mark.parametrize("family", COMMON)


def watch(model: nn.Module, names: list[str]) -> tuple[dict[str, Any], Callable[[], None]]:
    """Keep the last output of each router; return them and the way to stop."""
    seen: dict[str, Any] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: seen.__setitem__(name, output)
        )
        for name in names
    ]
    return seen, lambda: [handle.remove() for handle in handles]


def router_gradients(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.grad.clone() for name in names}


@each_family
def test_every_moe_layer_is_found_with_its_gate(family: str) -> None:
    model = tiny(family)
    sites = mb.huggingface.find_sites(model)
    experts = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    assert len(sites) == len(experts) == 2
    for site in sites:
        assert (site.num_experts, site.top_k) == (8, 2)
        assert site.rule.gate == (mb.Sigmoid() if family in SIGMOID else mb.Softmax())
        assert (site.bias is not None) == (family in NATIVE_BIAS)


@each_family
def test_the_rule_recomputes_the_routers_own_weights(family: str) -> None:
    model, ids = tiny(family), tokens()
    sites = {site.name: site for site in mb.huggingface.find_sites(model)}
    seen, stop = watch(model, list(sites))
    model(input_ids=ids)
    stop()
    for name, (logits, weights, experts, *_) in seen.items():
        torch.testing.assert_close(
            sites[name].rule.weigh(logits, experts), weights.float(), rtol=1e-5, atol=1e-7
        )


@each_family
def test_injected_gradient_equals_the_explicit_term(family: str) -> None:
    ids, method = tokens(), mb.PhiBalancing(strength=0.5)
    model = tiny(family)
    names = [site.name for site in mb.huggingface.find_sites(model)]
    gates = {site.name: site.rule.gate for site in mb.huggingface.find_sites(model)}

    seen, stop = watch(model, names)
    loss = model(input_ids=ids, labels=ids).loss
    stop()
    loss.backward(retain_graph=True)
    task = router_gradients(model, names)
    model.zero_grad()
    for name, (logits, _, experts, *_) in seen.items():
        routing = mb.routing.route(logits, experts, gates[name])
        sums = mb.routing.measure(routing)
        loss = loss + method.penalty(method.init(8), mb.routing.Batch(routing, sums, sums))
    loss.backward()
    explicit = router_gradients(model, names)
    model.zero_grad()

    with mb.attach(model, method):
        model(input_ids=ids, labels=ids).loss.backward()
        injected = router_gradients(model, names)
    for name in names:
        size = explicit[name].norm()
        # Scores of a sigmoid are summed in another order, and near balance the price is a small
        # difference of logarithms, which shows the last digit of its load.
        exactness = 1e-6 if isinstance(gates[name], mb.Softmax) else 2e-5
        assert (injected[name] - explicit[name]).norm() <= exactness * size
        # The term is large enough here for the comparison to mean something.
        assert (explicit[name] - task[name]).norm() > 1e-2 * size


@each_family
def test_statistics_equal_a_recomputation_from_the_routers_output(family: str) -> None:
    model, ids = tiny(family), tokens()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    real = mask.bool().reshape(-1)
    with mb.attach(model, mb.NoBalancing()) as balancing:
        seen, stop = watch(model, list(balancing.layers))
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        stop()
        balancing.step()
        for name, layer in balancing.layers.items():
            logits, _, experts, *_ = seen[name]
            sums = layer.last_sums
            assert sums.tokens.item() == 19
            expected = torch.bincount(experts[real].reshape(-1), minlength=8).float()
            assert torch.equal(sums.counts, expected)
            scores = layer.gate.scores(logits)[real].sum(dim=0)
            torch.testing.assert_close(sums.scores, scores.detach())


@each_family
def test_selection_price_moves_the_choice_but_not_the_weight_of_who_stays(family: str) -> None:
    model, ids = tiny(family).eval(), tokens()
    # A dense model cannot be told apart by deeper layers: look at the first router only, whose
    # input does not depend on any choice.
    name = mb.huggingface.find_sites(model)[0].name
    rule = mb.huggingface.find_sites(model)[0].rule
    seen, stop = watch(model, [name])
    model(input_ids=ids)
    stop()
    before = seen[name][2]
    busiest = torch.bincount(before.reshape(-1), minlength=8).argmax().item()
    with mb.attach(model, mb.LossFree(speed=10.0)) as balancing:
        sums = mb.routing.Sums(torch.ones(8), torch.ones(8), torch.tensor(1.0))
        sums.counts[busiest] = 9.0
        for layer in balancing.layers.values():
            layer.count(sums)
        balancing.step()
        seen, stop = watch(model, [name])
        model(input_ids=ids)
        stop()
    logits, weights, after, *_ = seen[name]
    assert (before == busiest).any()
    assert not (after == busiest).any()
    # What stays is weighed by its affinity alone: the price has no part in it.
    torch.testing.assert_close(weights.float(), rule.weigh(logits, after), rtol=1e-5, atol=1e-7)


@each_family
def test_detach_restores_outputs_bit_for_bit_and_keys_never_change(family: str) -> None:
    model, ids = tiny(family), tokens()
    keys = list(model.state_dict())
    before = model(input_ids=ids).logits
    both = mb.Together(mb.PhiBalancing(strength=0.1), mb.LossFree(speed=0.05))
    balancing = mb.attach(model, both)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(input_ids=ids).logits, before)
    balancing.detach()
    assert torch.equal(model(input_ids=ids).logits, before)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    fresh = tiny(family)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in fresh.modules())


@pytest.mark.parametrize("family", sorted(NATIVE_BIAS))
def test_a_native_selection_bias_carries_the_price_and_is_saved_with_the_model(
    family: str, tmp_path: Any
) -> None:
    model, ids = tiny(family), tokens()
    balancing = mb.attach(model, mb.LossFree(speed=0.05))
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    sites = mb.huggingface.find_sites(model)
    for site in sites:
        price = balancing.layers[site.name].price
        assert price.abs().max() > 0
        torch.testing.assert_close(site.bias.reshape(-1), -price)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for mine, theirs in zip(sites, mb.huggingface.find_sites(again), strict=True):
        assert torch.equal(mine.bias, theirs.bias)


CHECKPOINTING = {"plain": None, "non-reentrant": False, "reentrant": True}
COMPILING = {
    "eager": lambda model: model,
    "whole": lambda model: torch.compile(model, backend="aot_eager"),
    "layers": lambda model: (
        [layer.compile(backend="aot_eager") for layer in model.model.layers] and model
    ),
}


@pytest.mark.parametrize("compiling", COMPILING)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_counted_once_and_charged_alike_in_every_mode(checkpointing: str, compiling: str) -> None:
    ids = tokens()
    both = mb.Together(mb.PhiBalancing(strength=0.5), mb.LossFree(speed=0.01))

    def run(checkpointing: str, compiling: str) -> tuple[list[Tensor], Tensor]:
        torch._dynamo.reset()
        model = tiny("mixtral")
        balancing = mb.attach(model, both)
        reentrant = CHECKPOINTING[checkpointing]
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        call = COMPILING[compiling](model)
        for _ in range(2):
            (3 * call(input_ids=ids, labels=ids).loss).backward()
            balancing.step()
        sums = [layer.last_sums.counts for layer in balancing.layers.values()]
        model.eval()
        with torch.no_grad():
            call(input_ids=ids, labels=ids)
        assert all(layer.running.abs().sum() == 0 for layer in balancing.layers.values())
        return sums, model.model.layers[0].mlp.gate.weight.grad

    expected_counts, expected_gradient = run("plain", "eager")
    counts, gradient = run(checkpointing, compiling)
    for mine, theirs in zip(counts, expected_counts, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.sum() == ids.numel() * 2
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


def test_evaluation_and_no_grad_forwards_are_not_counted() -> None:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(RuntimeError, match=r"No token was counted in model\.layers\.0"):
        balancing.step()


def test_a_trained_selection_bias_is_where_the_price_starts() -> None:
    model, ids = tiny("deepseek_v3"), tokens()
    bias = mb.huggingface.find_sites(model)[0].bias
    bias.copy_(torch.linspace(-0.3, 0.3, 8))
    trained = bias.clone()
    balancing = mb.attach(model, mb.LossFree(speed=0.01))
    assert torch.equal(bias, trained)
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    assert (bias - trained).abs().max().item() == pytest.approx(0.01, rel=1e-4)
    balancing.detach()
    assert torch.equal(bias, trained)


def test_state_follows_a_model_that_moves_after_attaching() -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.Together(mb.PhiBalancing(), mb.LossFree()))
    # The meta device stands in for another one.
    balancing.place({name: torch.device("meta") for name in balancing.layers})
    for layer in balancing.layers.values():
        assert {t.device.type for t in (layer.running, layer.price, layer.loss_scale)} == {"meta"}
    assert len({id(layer.loss_scale) for layer in balancing.layers.values()}) == 1


def test_state_stays_where_its_values_are_while_the_model_is_on_meta() -> None:
    model, ids = tiny("mixtral"), tokens()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    balancing = mb.attach(model, mb.Together(mb.PhiBalancing(), mb.LossFree()))
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    before = balancing.state_dict()
    model.to("meta")
    with contextlib.suppress(RuntimeError):  # the model cannot run to its end there
        model(input_ids=ids.to("meta"))
    for name, layer in balancing.state_dict()["layers"].items():
        for key, tensor in layer.items():
            assert torch.equal(tensor, before["layers"][name][key])
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = tiny("mixtral").model.rotary_emb
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == ids.numel()


def test_generating_between_training_steps_is_not_counted_and_does_no_harm() -> None:
    model, ids = tiny("mixtral", use_cache=True), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    balancing = mb.attach(model, mb.Together(mb.PhiBalancing(), mb.Sinkhorn()))
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    # As online reinforcement learning does it: sampling from a model in training mode.
    model.generate(input_ids=ids[:1, :5], max_new_tokens=3, do_sample=False)
    balancing.step()
    assert balancing.metrics()["tokens"] == mask.sum().item()


def test_a_native_bias_follows_a_model_that_changes_dtype_after_attaching() -> None:
    model, ids = tiny("deepseek_v3"), tokens()
    balancing = mb.attach(model, mb.LossFree(speed=0.125))
    model.to(torch.bfloat16)
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()
    for site in mb.huggingface.find_sites(model):
        price = balancing.layers[site.name].price
        assert price.dtype == torch.float32
        assert price.abs().max() == 0.125
        assert torch.equal(site.bias.float(), -price)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_two_forwards_before_a_backward_keep_their_own_masks(checkpointing: str) -> None:
    model, ids = tiny("mixtral"), tokens()
    masks = [torch.ones_like(ids), torch.ones_like(ids)]
    masks[1][:, :3] = 0
    balancing = mb.attach(model, mb.PhiBalancing())
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    losses = [model(input_ids=ids, attention_mask=mask, labels=ids).loss for mask in masks]
    with torch.no_grad():  # as a reference model's pass would be, in between
        model(input_ids=ids[:1])
    sum(losses).backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == sum(mask.sum().item() for mask in masks)


def test_a_tuple_output_is_followed_as_well() -> None:
    model, ids = tiny("mixtral"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    (model(input_ids=ids, labels=ids, return_dict=False)[0] / 8).backward()
    assert {layer.loss_scale.item() for layer in balancing.layers.values()} == {0.125}


def test_a_new_family_of_the_common_shape_works_without_a_change_of_ours() -> None:
    class NewFamilyRouter(nn.Module):
        """Sigmoid affinities, normalised and scaled, under a name seen nowhere else."""

        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight, self.top_k = nn.Parameter(weight.detach().clone()), 2

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = hidden @ self.weight.T
            weights, experts = logits.sigmoid().topk(self.top_k)
            return logits, 1.5 * weights / weights.sum(-1, keepdim=True), experts

    model, ids = tiny("mixtral"), tokens()
    for layer in model.model.layers:
        layer.mlp.gate = NewFamilyRouter(layer.mlp.gate.weight)
    assert {site.rule.gate for site in mb.huggingface.find_sites(model)} == {mb.Sigmoid()}
    assert [site.rule.scaling for site in mb.huggingface.find_sites(model)] == pytest.approx(
        [1.5, 1.5]
    )
    with mb.attach(model, mb.Together(mb.PhiBalancing(), mb.LossFree())) as balancing:
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()
        assert balancing.metrics()["tokens"] == ids.numel()
