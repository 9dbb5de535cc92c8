"""The rivals that charge in the loss, against transcriptions of their papers or a peer's code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import scipy.special
import torch

from cases import (
    POTENTIALS,
    add,
    one_batch,
    plain_top_k,
    random_logits,
    random_routing,
    skewed_state,
    tensors,
    to_double,
)
from moebalance import (
    Euclidean,
    GlobalBatchLoss,
    LossFree,
    Method,
    NoBalancing,
    PhiBalancing,
    PlugInLoss,
    QuantileBalancing,
    SequenceLoss,
    Sigmoid,
    Sinkhorn,
    Softmax,
    SwitchLoss,
    Together,
    ZLoss,
)
from moebalance.methods import observe
from moebalance.routing import Batch, route


def doubled(**kwargs):
    return random_routing(dtype=torch.float64, **kwargs)


def penalty(method, routing, state=()):
    return method.penalty(state, one_batch(method, state, routing)).item()


# --- Switch -----------------------------------------------------------------------------------


def test_switch_is_equations_4_to_6_of_fedus():
    routing = doubled(tokens=40, num_experts=6, top_k=1)
    p = scipy.special.softmax(routing.logits.numpy(), axis=-1)
    fraction = np.array([(p.argmax(-1) == expert).mean() for expert in range(6)])  # Eq. 5
    mean = p.mean(0)  # Eq. 6
    expected = 0.03 * 6 * (fraction * mean).sum()  # Eq. 4
    assert penalty(SwitchLoss(strength=0.03), routing) == pytest.approx(expected, rel=1e-12)


def test_switch_is_one_for_balanced_and_number_of_experts_for_collapsed_routing():
    eye = torch.eye(4, dtype=torch.float64)
    balanced = plain_top_k(1000 * eye, 1)
    collapsed = plain_top_k(1000 * eye[:1].expand(4, 4), 1)
    assert penalty(SwitchLoss(strength=1.0), balanced) == pytest.approx(1)
    assert penalty(SwitchLoss(strength=1.0), collapsed) == pytest.approx(4)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_transformers_loss_on_one_layer_is_top_k_times_ours(top_k, padded):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routing = doubled(tokens=24, num_experts=8, top_k=top_k, padded=padded, sequences=4)
    mask = None if routing.mask is None else routing.mask.view(4, 6).long()
    theirs = load_balancing_loss_func((routing.logits,), 8, top_k, mask)
    assert top_k * penalty(SwitchLoss(strength=1.0), routing) == pytest.approx(
        theirs.item(),
        rel=1e-6,  # theirs counts in float32
    )


# --- global batch -----------------------------------------------------------------------------


def micro_batches(method, parts):
    """The batches of one step, as the body makes them: each with the sums so far."""
    step = None
    for routing in parts:
        sums = observe(method, (), routing)
        step = sums if step is None else add(step, sums)
        yield Batch(routing, sums, step)


def concatenated(parts):
    return route(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.experts for part in parts]),
        parts[0].gate,
    )


def test_global_batch_price_is_that_of_switch_on_everything_so_far():
    parts = [doubled(tokens=size, seed=seed) for seed, size in enumerate((8, 24, 16))]
    method = GlobalBatchLoss(strength=0.02)
    for seen, batch in enumerate(micro_batches(method, parts), start=1):
        so_far = one_batch(SwitchLoss(strength=0.02), (), concatenated(parts[:seen]))
        expected = SwitchLoss(strength=0.02).loss_price((), so_far)
        torch.testing.assert_close(method.loss_price((), batch), expected)


def test_last_micro_batch_of_global_batch_has_the_gradient_of_switch_on_the_concatenation():
    parts = [doubled(tokens=12, seed=seed) for seed in range(3)]
    method = GlobalBatchLoss(strength=0.02)
    last = list(micro_batches(method, parts))[-1]
    whole = concatenated(parts)
    expected = SwitchLoss(strength=0.02).penalty_gradient((), one_batch(method, (), whole))
    torch.testing.assert_close(method.penalty_gradient((), last) / 3, expected[-12:])


def test_global_batch_forgets_finished_steps():
    method = GlobalBatchLoss(strength=0.02)
    assert method.update(method.init(8), one_batch(method, (), doubled()).sums) == ()


# --- plug-in ----------------------------------------------------------------------------------

LINEAR_ON_COUNTS = {"potential": Euclidean(), "load": "hard", "pseudo_count": 0.0}


def test_euclidean_plug_in_on_counts_has_the_gradient_of_switch():
    routing = doubled(tokens=40, num_experts=6)
    plug_in, switch = PlugInLoss(**LINEAR_ON_COUNTS, strength=0.02), SwitchLoss(strength=0.02)
    torch.testing.assert_close(
        plug_in.penalty_gradient((), one_batch(plug_in, (), routing)),
        switch.penalty_gradient((), one_batch(switch, (), routing)),
    )


def test_euclidean_plug_in_on_the_step_so_far_has_the_gradient_of_global_batch():
    parts = [doubled(tokens=size, seed=seed) for seed, size in enumerate((8, 24, 16))]
    plug_in = PlugInLoss(**LINEAR_ON_COUNTS, strength=0.02, window="step")
    whole = GlobalBatchLoss(strength=0.02)
    batches = zip(micro_batches(plug_in, parts), micro_batches(whole, parts), strict=True)
    for ours, theirs in batches:
        torch.testing.assert_close(
            plug_in.penalty_gradient((), ours), whole.penalty_gradient((), theirs)
        )


@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS)
def test_plug_in_descends_the_potential_of_the_batch_itself(potential):
    """Its gradient is E times that of φ(p̄), through p̄ alone."""
    routing = doubled(tokens=40, num_experts=6)
    logits = routing.logits.requires_grad_()
    potential.value(Softmax().scores(logits).mean(dim=0)).backward()
    method = PlugInLoss(potential, strength=0.03, unit="paper")
    found = method.penalty_gradient((), one_batch(method, (), routing))
    torch.testing.assert_close(found.detach(), 0.03 * 6 * logits.grad)


def test_phi_without_memory_is_a_plug_in():
    routing = doubled(tokens=40, num_experts=6)
    phi, plug_in = PhiBalancing(strength=0.03, rate=1.0), PlugInLoss(strength=0.03)
    state = to_double(skewed_state(phi, 6))
    torch.testing.assert_close(
        phi.penalty_gradient(state, one_batch(phi, state, routing)),
        plug_in.penalty_gradient((), one_batch(plug_in, (), routing)),
    )


def test_an_empty_expert_has_a_moderate_price_with_a_pseudo_count():
    one_expert = plain_top_k(random_logits(16, 4) + torch.tensor([50.0, 0, 0, 0]), 1)
    for pseudo_count, spread in ((0.5, np.log(16.5 / 0.5)), (0.0, 87.3)):
        method = PlugInLoss(strength=4.0, load="hard", pseudo_count=pseudo_count)
        price = method.loss_price((), one_batch(method, (), one_expert))
        assert (price.max() - price.min()).item() == pytest.approx(spread, rel=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"load": "both"}, {"window": "epoch"}, {"strength": -1.0}, {"pseudo_count": -1}]
)
def test_plug_in_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PlugInLoss(**wrong)


# --- sequence-wise ----------------------------------------------------------------------------


def deepseek_v3(affinities, experts, mask, *, strength, top_k):
    """Eq. 17–20 of the DeepSeek-V3 report, mean over the sequences."""
    losses = []
    for s, chosen, real in zip(affinities, experts, mask, strict=True):
        if not real.any():
            continue
        s, chosen = s[real], chosen[real]
        length, num_experts = s.shape
        count = np.array([(chosen == i).sum() for i in range(num_experts)])
        f = num_experts / (top_k * length) * count  # Eq. 18
        normalised = s / s.sum(-1, keepdims=True)  # Eq. 19
        losses.append(strength * (f * normalised.mean(0)).sum())  # Eq. 20, 17
    return np.mean(losses)


@pytest.mark.parametrize("gate", [Sigmoid(), Softmax()], ids=repr)
@pytest.mark.parametrize("lengths", [(6, 6, 6, 6), (6, 1, 4, 0)], ids=["full", "unequal"])
def test_sequence_loss_is_equations_17_to_20_of_deepseek_v3(gate, lengths):
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    logits = random_logits(24, 8, dtype=torch.float64)
    routing = plain_top_k(logits, 2, gate=gate, mask=mask.view(-1), sequences=4)
    z = logits.view(4, 6, 8).numpy()
    affinities = scipy.special.expit(z) if gate == Sigmoid() else scipy.special.softmax(z, -1)
    experts = routing.experts.view(4, 6, 2).numpy()
    expected = deepseek_v3(affinities, experts, mask.numpy(), strength=0.1, top_k=2)
    assert penalty(SequenceLoss(strength=0.1), routing) == pytest.approx(expected, rel=1e-12)


def test_sequence_loss_of_a_single_sequence_is_the_switch_loss():
    routing = doubled(padded=True)
    expected = penalty(SwitchLoss(strength=0.1), routing)
    assert penalty(SequenceLoss(strength=0.1), routing) == pytest.approx(expected, rel=1e-12)


# --- z-loss and compositions ------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_z_loss_is_the_mean_squared_log_partition(padded):
    routing = doubled(padded=padded)
    z = routing.logits.numpy()
    real = slice(None) if routing.mask is None else routing.mask.numpy()
    expected = 0.1 * (scipy.special.logsumexp(z[real], axis=-1) ** 2).mean()
    assert penalty(ZLoss(strength=0.1), routing) == pytest.approx(expected, rel=1e-12)


def test_together_charges_the_sum_and_selects_as_its_selector():
    phi, z, quantile = PhiBalancing(strength=0.1), ZLoss(strength=0.1), QuantileBalancing(bins=32)
    both = Together(Together(phi, z), quantile)
    states = [to_double(skewed_state(part, 8)) for part in (phi, z, quantile)]
    state = to_double(skewed_state(both, 8))
    routing = doubled()
    batch = one_batch(both, state, routing)
    gradient, term = torch.zeros(()), torch.zeros(())
    for part, own in zip((phi, z), states, strict=False):
        alone = one_batch(part, own, routing)
        gradient = gradient + part.penalty_gradient(own, alone)
        term = term + part.penalty(own, alone)
    torch.testing.assert_close(both.penalty_gradient(state, batch), gradient)
    torch.testing.assert_close(both.penalty(state, batch), term)
    assert torch.equal(both.selection_price(state), states[2].price)

    after = both.update(state, batch.sums)
    alone = one_batch(quantile, states[2], routing)
    assert torch.equal(after[1].price, quantile.update(states[2], alone.sums).price)
    expected = phi.update(states[0], one_batch(phi, states[0], routing).sums)
    assert all(torch.equal(a, b) for a, b in zip(tensors(after[0][0]), expected, strict=True))


@dataclass(frozen=True)
class ChargesItsOwnSum(Method):
    """Charges what it alone has summed: (1, E) of Σ p² so far in the step, times `factor`."""

    factor: float

    def extra_shapes(self, num_experts):
        return ((1, num_experts),)

    def extra(self, state, routing):
        return (routing.scores.square().sum(dim=0, keepdim=True),)

    def loss_price(self, state, batch):
        return self.factor * (batch.sums.extra[0][0] + batch.step.extra[0][0])


def test_together_hands_each_part_its_own_extra_sums():
    method, histogram = ChargesItsOwnSum(factor=0.1), QuantileBalancing(bins=16)
    routing = random_routing()
    expected = method.penalty_gradient((), one_batch(method, (), routing))
    for both in (Together(method, histogram), Together(histogram, method)):
        state = both.init(8)
        assert torch.equal(both.penalty_gradient(state, one_batch(both, state, routing)), expected)


def test_together_takes_its_parts_in_either_order():
    phi, loss_free = PhiBalancing(strength=0.1), LossFree(speed=0.1)
    one, other = Together(phi, loss_free), Together(loss_free, phi)
    a, b = skewed_state(one, 8), skewed_state(other, 8)
    assert torch.equal(one.selection_price(a), other.selection_price(b))
    routing = random_routing()
    assert torch.equal(
        one.penalty_gradient(a, one_batch(one, a, routing)),
        other.penalty_gradient(b, one_batch(other, b, routing)),
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LossFree(), QuantileBalancing()),
        (Sinkhorn(), LossFree()),
        (Together(PhiBalancing(), LossFree()), Sinkhorn()),
    ],
    ids=lambda method: type(method).__name__,
)
def test_two_methods_that_both_choose_experts_are_refused(first, second):
    with pytest.raises(ValueError, match="both choose experts"):
        Together(first, second)


def test_together_refuses_what_is_no_method():
    with pytest.raises(TypeError, match="give methods"):
        Together(PhiBalancing(), "loss-free")


def test_no_balancing_watches_and_pulls_no_lever():
    method = NoBalancing()
    batch = one_batch(method, (), random_routing())
    assert batch.sums.counts.sum() == 48
    assert not method.traits.charges
    assert not method.traits.selects
    assert method.penalty((), batch) is None


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: SwitchLoss(strength=-1.0), "strength"),
        (lambda: GlobalBatchLoss(strength=float("inf")), "strength"),
        (lambda: SequenceLoss(strength=-0.1), "strength"),
        (lambda: ZLoss(strength=-0.1), "strength"),
        (lambda: LossFree(speed=-0.1), "speed"),
        (lambda: LossFree(rule="signum"), "rule"),
        (lambda: QuantileBalancing(bins=1), "bins"),
        (lambda: Sinkhorn(iterations=0), "iterations"),
        (lambda: Sinkhorn(temperature=0.0), "temperature"),
    ],
)
def test_impossible_hyper_parameters_are_refused_by_name(build, name):
    with pytest.raises(ValueError, match=name):
        build()
