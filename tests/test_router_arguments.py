"""What a router can be told with its logits: packed text, replayed choices, masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import moebalance as mb
from cases import METHODS
from moebalance import Method
from processes import run

EXPERTS, TOP_K, BATCH, LENGTH = 8, 2, 4, 32


def logits_of(*shape: int, seed: int = 0) -> Tensor:
    """Each sequence prefers experts of its own."""
    generator = torch.Generator().manual_seed(seed)
    own = 2 * torch.randn(*shape[:-1], 1, EXPERTS, generator=generator)
    return torch.randn(*shape, EXPERTS, generator=generator) + own


def gradient(method: Method, logits: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    router = mb.BalancedRouter(method, EXPERTS, TOP_K)
    leaf = logits.clone().requires_grad_()
    with mb.attach(router):
        (0 * router(leaf, mask, **more)[0]).sum().backward()
    return leaf.grad.reshape(-1, EXPERTS)


SEQUENCE = {
    "alone": mb.SequenceLoss(1.0),
    "together": mb.Together(mb.SequenceLoss(1.0), mb.PhiBalancing(), mb.LossFree()),
    "steered": mb.Targeted(mb.SequenceLoss(1.0), mb.MaxVio(0.3)),
}


# --- packed text ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEQUENCE)
def test_packed_rows_with_boundaries_are_charged_as_the_sequences_apart(name):
    method, logits = SEQUENCE[name], logits_of(BATCH, LENGTH)
    apart = gradient(method, logits)
    flat = logits.reshape(-1, EXPERTS)
    bounds = torch.arange(0, BATCH * LENGTH + 1, LENGTH)
    for packed in (flat, flat.unsqueeze(0)):
        for told in ({"cu_seqlens": bounds}, {"cu_seqlens": bounds.int()}, {"sequences": BATCH}):
            torch.testing.assert_close(gradient(method, packed, **told), apart)
    assert not torch.allclose(gradient(method, flat.unsqueeze(0)), apart, atol=1e-3)


def test_packed_sequences_of_unequal_lengths_are_those_of_padded_rows():
    lengths = [5, 1, 0, 12]
    rows = logits_of(len(lengths), 12)
    real = torch.arange(12) < torch.tensor(lengths).unsqueeze(-1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    padded = gradient(mb.SequenceLoss(1.0), rows, real)[real.flatten()]
    packed = gradient(mb.SequenceLoss(1.0), rows[real], cu_seqlens=bounds)
    torch.testing.assert_close(packed, padded)


@pytest.mark.parametrize("name", ["switch", "sequence", "phi-hard"])
def test_tokens_behind_the_last_boundary_are_padding(name):
    logits = logits_of(1, 20)[0]
    bounds = torch.tensor([0, 8, 15])
    whole = gradient(METHODS[name], logits, cu_seqlens=bounds)
    torch.testing.assert_close(whole[:15], gradient(METHODS[name], logits[:15], cu_seqlens=bounds))
    assert not whole[15:].any()


def test_a_loss_of_whole_sequences_is_refused_without_boundaries():
    flat = logits_of(1, 12)[0]
    for method in SEQUENCE.values():
        with pytest.raises(ValueError, match=r"do not say where they end.*cu_seqlens"):
            gradient(method, flat)
        with pytest.raises(ValueError, match="do not say where they end"):
            mb.CountAndCharge(method, EXPERTS)(flat.requires_grad_(), flat.topk(2).indices)
        mb.BalancedRouter(method, EXPERTS, TOP_K).eval()(flat)  # nothing is charged there


WRONG = {
    "both": ({"sequences": 2, "cu_seqlens": torch.tensor([0, 12])}, "not both"),
    "no fit": ({"sequences": 5}, "do not fall into sequences=5"),
    "none": ({"sequences": 0}, "do not fall into sequences=0"),
    "lengths": ({"cu_seqlens": torch.tensor([5, 7])}, "must begin with 0"),
    "falling": ({"cu_seqlens": torch.tensor([0, 7, 5])}, "never fall"),
    "too far": ({"cu_seqlens": torch.tensor([0, 13])}, "end at most at the last token"),
    "floats": ({"cu_seqlens": torch.tensor([0.0, 12.0])}, "whole numbers"),
    "one": ({"cu_seqlens": torch.tensor([0])}, "such as"),
}


@pytest.mark.parametrize("case", WRONG)
def test_boundaries_that_do_not_fit_are_refused(case):
    more, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        gradient(mb.SequenceLoss(1.0), logits_of(1, 12)[0], **more)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_a_token_has_gradient_zero(name, shape):
    assert gradient(METHODS[name], torch.zeros(*shape, EXPERTS)).shape == (0, EXPERTS)


# --- replayed choices -------------------------------------------------------------------------


def replayed(tokens: int, seed: int = 0) -> Tensor:
    """A rollout that prefers expert 0."""
    generator = torch.Generator().manual_seed(seed)
    others = 1 + torch.randint(EXPERTS - 1, (tokens, TOP_K - 1), generator=generator)
    return torch.cat([torch.zeros(tokens, 1, dtype=torch.long), others], dim=1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("gate", [mb.Softmax(), mb.Sigmoid()])
def test_replayed_experts_get_the_weights_of_the_gate(gate, normalize):
    logits, experts = logits_of(1, 12)[0], replayed(12)
    router = mb.BalancedRouter(mb.LossFree(), EXPERTS, TOP_K, gate=gate, normalize=normalize)
    weights, chosen = router(logits, experts=experts)
    assert torch.equal(chosen, experts)
    expected = gate.affinities(logits).gather(-1, experts)
    expected = expected / expected.sum(-1, keepdim=True) if normalize else expected
    torch.testing.assert_close(weights, expected)
    three, shape = router(logits.view(3, 4, -1), experts=experts.view(3, 4, -1)), (3, 4, TOP_K)
    assert torch.equal(three[1], experts.view(shape))


@pytest.mark.parametrize("name", ["phi-soft", "phi-hard", "switch"])
def test_replaying_the_own_choice_charges_and_counts_as_choosing_does(name):
    method = METHODS.get(name, mb.PhiBalancing(strength=0.05))
    logits = logits_of(1, 12)[0]
    own = logits.topk(TOP_K).indices
    torch.testing.assert_close(gradient(method, logits, experts=own), gradient(method, logits))


INTEGRATES: dict[str, Method] = {
    "loss-free": mb.LossFree(speed=0.01),
    "proportional": mb.LossFree(speed=0.01, rule="proportional"),
    "nats": mb.LossFree(scale="nats"),
    "quantile": mb.QuantileBalancing(),
    "smebu": mb.SMEBU(speed=0.01),
    "targeted": mb.Targeted(mb.PhiBalancing(load="hard"), mb.MaxVio(0.1)),
    "scheduled": mb.Scheduled(mb.LossFree(speed=0.01), warmup_tokens=10),
    "together": mb.Together(mb.PhiBalancing(), mb.LossFree(speed=0.01)),
}


def leaves(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for part in state for x in leaves(part)]


def drift(
    method: Method, *, steps: int = 20, real_batches: int = 0
) -> tuple[mb.BalancedRouter, mb.Balancing]:
    """A router and its handle after replayed steps."""
    router = mb.BalancedRouter(method, EXPERTS, TOP_K)
    balancing = mb.attach(router)
    for step in range(steps):
        logits = logits_of(1, 24, seed=step)[0].requires_grad_()
        router(logits, experts=replayed(24, step))[0].sum().backward()
        for _ in range(real_batches):
            router(logits)[0].sum().backward()
        balancing.step()
    return router, balancing


def moved(method: Method, router: mb.BalancedRouter) -> float:
    fresh, held = method.init(EXPERTS), router.state
    pairs = list(zip(leaves(method.held(fresh, held)), leaves(held), strict=True))
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("real_batches", [0, 1])
@pytest.mark.parametrize("name", INTEGRATES)
def test_a_replayed_step_is_counted_and_freezes_what_integrates(name, real_batches):
    method = INTEGRATES[name]
    router, balancing = drift(method, real_batches=real_batches)
    assert moved(method, router) == 0
    assert balancing.metrics()["tokens"] == 24 * (1 + real_batches)
    assert balancing.metrics()["maxvio"] > 0.5


@pytest.mark.parametrize("name", INTEGRATES)
def test_a_step_after_replayed_ones_moves_again(name):
    """Otherwise the test above could not fail."""
    method = INTEGRATES[name]
    router, balancing = drift(method)
    for step in range(2):
        router(logits_of(1, 24, seed=step)[0].requires_grad_())[0].sum().backward()
        balancing.step()
    assert moved(method, router) > 0


def test_an_average_goes_on_through_replayed_steps():
    router, _ = drift(mb.PhiBalancing(load="hard"))
    assert any(leaf.any() for leaf in leaves(router.state))


def test_a_discarded_replay_freezes_nothing():
    router = mb.BalancedRouter(mb.LossFree(), EXPERTS, TOP_K)
    balancing = mb.attach(router)
    logits = logits_of(1, 24)[0].requires_grad_()
    router(logits, experts=replayed(24))[0].sum().backward()
    balancing.discard()
    router(logits)[0].sum().backward()
    balancing.step()
    assert router.price.any()


def test_count_and_charge_can_be_told_of_a_replay():
    for told in (False, True):
        balance = mb.CountAndCharge(mb.LossFree(), EXPERTS)
        balancing = mb.attach(balance)
        logits = logits_of(1, 24)[0].requires_grad_()
        balance(logits, replayed(24), replayed=told).sum().backward()
        balancing.step()
        assert bool(balance.price.any()) is not told


def replay_on_one_rank() -> Tensor:
    import torch.distributed as dist

    router = mb.BalancedRouter(mb.LossFree(), EXPERTS, TOP_K)
    balancing = mb.attach(router)
    for step in range(2):
        logits = logits_of(1, 24, seed=step)[0].requires_grad_()
        given = replayed(24) if step == 0 and dist.get_rank() == 1 else None
        router(logits, experts=given)[0].sum().backward()
        balancing.step()
        if step == 0:
            first = router.price.clone()
    return torch.stack([first, router.price])


def test_a_replay_on_one_rank_freezes_the_step_on_all():
    first, second = run(replay_on_one_rank, 2)
    assert torch.equal(first, second)
    assert not first[0].any()
    assert first[1].any()


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (torch.zeros(12, 3, dtype=torch.long), r"give whole numbers of shape \(12, 2\)"),
        (torch.zeros(12, 2), "whole numbers"),
        (torch.full((12, 2), -1), "experts from -1 to -1"),
        (torch.full((12, 2), EXPERTS), "has 0 to 7"),
    ],
)
def test_choices_that_do_not_fit_are_refused(experts, said):
    router = mb.BalancedRouter(mb.LossFree(), EXPERTS, TOP_K)
    with pytest.raises(ValueError, match=said):
        router(logits_of(1, 12)[0], experts=experts)


@pytest.mark.parametrize(
    ("logits", "experts", "mask", "said"),
    [
        ((5, 16), (5, 2), None, "the last axis must be the experts"),
        ((5, 8), (4, 2), None, r"give whole numbers of shape \(5, K\)"),
        ((4, 5, 8), (20, 2), None, r"give whole numbers of shape \(4, 5, K\)"),
        ((4, 5, 8), (4, 5, 2), (5, 4), "the logits' shape without the last axis"),
    ],
)
def test_a_choice_of_the_layers_own_has_to_fit_too(logits, experts, mask, said):
    balance = mb.CountAndCharge(mb.PhiBalancing(), EXPERTS)
    given = None if mask is None else torch.ones(mask, dtype=torch.bool)
    with pytest.raises(ValueError, match=said):
        balance(torch.randn(logits), torch.zeros(experts, dtype=torch.long), given)
    with pytest.raises(ValueError, match="has 0 to 7"):
        balance(torch.randn(5, 8), torch.full((5, 2), 9))
    assert not balance.running.any()


@pytest.mark.parametrize("ask", ["nothing", "price", "preference"])
@pytest.mark.parametrize("method", [mb.recommended(), mb.LossFree(), mb.Sinkhorn()], ids=str)
def test_a_layer_that_never_asks_what_to_rank_is_told_once(method, ask, caplog):
    balance = mb.CountAndCharge(method, EXPERTS)
    balancing = mb.attach(balance)
    for seed in range(3):
        logits = logits_of(1, 24, seed=seed)[0].requires_grad_()
        if ask == "price":
            _ = balance.price
        elif ask == "preference":
            balance.preference(logits.detach(), None, training=True)
        balance(logits, logits.topk(2).indices).sum().backward()
        balancing.step()
        balancing.metrics()
    told = [r.getMessage() for r in caplog.records if "never asked what to rank" in r.getMessage()]
    heard = ask == "preference" or (ask == "price" and balance.price is not None)
    assert len(told) == (not heard)


def test_a_layer_that_ranks_the_preference_is_balanced_by_the_recommended_method():
    balance = mb.CountAndCharge(mb.LossFree(scale="nats", speed=0.1), EXPERTS)
    balancing = mb.attach(balance)
    logits = logits_of(1, 512)[0].requires_grad_()
    for _ in range(300):
        order = balance.preference(logits.detach(), None, training=True)
        balance(logits, order.topk(TOP_K).indices).sum().backward()
        balancing.step()
    assert balancing.metrics()["maxvio"] < 0.1


@pytest.mark.parametrize("top_k", [2.0, "2", True, None])
def test_a_number_of_experts_a_token_is_a_whole_number(top_k):
    with pytest.raises(TypeError, match="must be a whole number"):
        mb.BalancedRouter(mb.PhiBalancing(), EXPERTS, top_k)
    weights, _ = mb.BalancedRouter(mb.PhiBalancing(), EXPERTS, np.int64(2))(torch.randn(3, EXPERTS))
    assert weights.shape == (3, 2)


# --- masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["router", "charge"])
def test_only_booleans_or_zeros_and_ones_pass_as_a_mask(kind):
    logits = logits_of(3, 4)
    real = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    module = {
        "router": mb.BalancedRouter(mb.SwitchLoss(), EXPERTS, TOP_K),
        "charge": mb.CountAndCharge(mb.SwitchLoss(), EXPERTS),
    }[kind]

    def call(mask: Tensor) -> None:
        leaf = logits.clone().requires_grad_()
        more = () if kind == "router" else (logits.topk(2).indices,)
        out = module(leaf, *more, mask)
        (out[0] if kind == "router" else out).sum().backward()

    for good in (real.bool(), real, real.int(), real.float(), real.bfloat16()):
        module.discard()
        call(good)
        assert module.running[2 * EXPERTS] == real.sum()
    additive = torch.zeros(3, 4).masked_fill(real == 0, float("-inf"))
    lowest = additive.clamp(min=torch.finfo(torch.float32).min)
    for bad in (additive, lowest, torch.zeros(3, 4), 2 * real, -10_000 * (1 - real)):
        with pytest.raises(ValueError, match="mask == 0"):
            call(bad)


# --- one expert -------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", [mb.Softmax(), mb.Sigmoid()])
def test_with_one_expert_the_task_trains_the_router_by_default(gate):
    router = mb.BalancedRouter(mb.NoBalancing(), EXPERTS, 1, gate=gate)
    logits = logits_of(1, 12)[0].requires_grad_()
    weights, experts = router(logits)
    torch.testing.assert_close(weights, gate.affinities(logits).gather(-1, experts))
    weights.sum().backward()
    assert logits.grad.abs().max() > 1e-3


def test_one_expert_with_normalised_weights_is_refused():
    with pytest.raises(ValueError, match="the task gives the router no gradient"):
        mb.BalancedRouter(mb.NoBalancing(), EXPERTS, 1, normalize=True)
    assert mb.BalancedRouter(mb.NoBalancing(), EXPERTS, 2).normalize
    assert not mb.BalancedRouter(mb.NoBalancing(), EXPERTS, 2, normalize=False).normalize


# --- what is said, and counted ----------------------------------------------------------------


def test_a_step_without_tokens_names_the_unused_output_as_a_cause():
    router = mb.BalancedRouter(mb.NoBalancing(), EXPERTS, 2)
    balancing = mb.attach(router)
    router(logits_of(1, 12)[0].requires_grad_())
    with pytest.raises(RuntimeError, match="output the loss does not use"):
        balancing.step()


def test_warm_up_passes_before_a_capture_are_forgotten_by_discard():
    router = mb.BalancedRouter(mb.LossFree(), EXPERTS, 2)
    balancing = mb.attach(router)
    logits = logits_of(1, 12)[0].requires_grad_()
    for passes in (3, 1):
        balancing.discard()
        for _ in range(passes):
            router(logits)[0].sum().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 12


def test_a_router_called_twice_in_a_step_counts_both_calls():
    router = mb.BalancedRouter(mb.SwitchLoss(1.0), EXPERTS, 2)
    balancing = mb.attach(router)
    logits = logits_of(1, 12)[0].requires_grad_()
    (router(logits)[0] + router(logits)[0]).sum().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 24
