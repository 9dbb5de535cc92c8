"""The rivals, each against a numpy transcription of its paper or the implementation of a peer."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch

from cases import (
    add,
    one_batch,
    plain_top_k,
    random_logits,
    random_routing,
    skewed_state,
    tensors,
    to_double,
)
from moebalance import metrics
from moebalance.balancers import (
    GlobalBatchLoss,
    LossFree,
    NoBalancing,
    PhiBalancing,
    QuantileBalancing,
    SequenceLoss,
    Sinkhorn,
    SwitchLoss,
    Together,
    ZLoss,
)
from moebalance.balancers.loss_free import SelectionPrice
from moebalance.routing import Batch, Sigmoid, Softmax, Sums, measure, route


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
        sums = method.observe((), routing)
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
        expected = SwitchLoss(strength=0.02).charged((), so_far)
        torch.testing.assert_close(method.charged((), batch), expected)


def test_last_micro_batch_of_global_batch_has_the_gradient_of_switch_on_the_concatenation():
    parts = [doubled(tokens=12, seed=seed) for seed in range(3)]
    method = GlobalBatchLoss(strength=0.02)
    last = list(micro_batches(method, parts))[-1]
    whole = concatenated(parts)
    expected = SwitchLoss(strength=0.02).logit_gradient((), one_batch(method, (), whole))
    torch.testing.assert_close(method.logit_gradient((), last) / 3, expected[-12:])


def test_global_batch_forgets_finished_steps():
    method = GlobalBatchLoss(strength=0.02)
    assert method.update(method.init(8), one_batch(method, (), doubled()).sums) == ()


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


# --- loss-free --------------------------------------------------------------------------------


def counted(*counts: float) -> Sums:
    load = torch.tensor(counts, dtype=torch.float64)
    return Sums(load, load, load.sum())


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LossFree(rate=0.1), [0.1, 0.0, -0.1, -0.1]),
        (LossFree(rate=0.1, rule="proportional"), [0.1 * 1.5, 0, -0.1 * 0.5, -0.1]),
        (LossFree(rate=0.1, recentre=True), [0.125, 0.025, -0.075, -0.075]),
    ],
    ids=repr,
)
def test_loss_free_moves_each_price_by_hand_computation(method, expected):
    """Counts 10, 4, 2, 0 around their mean of 4."""
    state = method.update(to_double(method.init(4)), counted(10, 4, 2, 0))
    torch.testing.assert_close(state.price, torch.tensor(expected, dtype=torch.float64))


def test_loss_free_is_algorithm_1_of_wang():
    """b_i ← b_i + u · sign(mean c − c_i), chosen by s + b, over 20 steps; our price is −b."""
    method, random = LossFree(rate=0.02), np.random.default_rng(0)
    state, b = to_double(method.init(8)), np.zeros(8)
    for _ in range(20):
        z = random.normal(size=(32, 8)) + np.linspace(-1, 1, 8)
        chosen = np.argsort(-(scipy.special.expit(z) + b), axis=-1)[:, :2]
        logits = torch.from_numpy(z)
        ranked = method.preference(state, Sigmoid(), logits, mask=None, training=True)
        experts = ranked.topk(2).indices
        assert (np.sort(experts.numpy()) == np.sort(chosen)).all()
        c = np.bincount(chosen.ravel(), minlength=8)
        b = b + 0.02 * np.sign(c.mean() - c)
        state = method.update(state, measure(route(logits, experts, Sigmoid())))
        np.testing.assert_allclose(state.price.numpy(), -b, atol=1e-12)


def skewed_logits(tokens, num_experts, seed):
    """Fresh tokens of one fixed router under which the busiest expert gets 3.7 times its share."""
    return random_logits(tokens, num_experts, seed=seed) + torch.linspace(-0.6, 0.6, num_experts)


def steer(method, gate, *, steps, tokens=1024, num_experts=16, top_k=2):
    """Mean MaxVio of the first and of the last 20 steps on fresh draws of one skewed router."""
    state, violations = method.init(num_experts), []
    for seed in range(steps):
        logits = skewed_logits(tokens, num_experts, seed)
        ranked = method.preference(state, gate, logits, mask=None, training=True)
        routing = route(logits, ranked.topk(top_k).indices, gate)
        sums = method.observe(state, routing)
        violations.append(metrics.max_violation(sums.counts).item())
        state = method.update(state, sums)
    return violations[0], float(np.mean(violations[-20:]))


@pytest.mark.parametrize(
    "method",
    [LossFree(rate=0.01), LossFree(rate=0.05, rule="proportional"), LossFree(0.01, recentre=True)],
    ids=repr,
)
def test_loss_free_brings_a_skewed_router_from_maxvio_2_7_below_a_quarter(method):
    """The sampling floor of 1024 tokens, 2 of 16 experts, is 0.21."""
    before, after = steer(method, Sigmoid(), steps=120)
    assert before > 2.5
    assert after < 0.25


def test_recentring_keeps_the_mean_price_at_zero_and_the_choice_as_it_was():
    plain, recentred = LossFree(rate=0.02), LossFree(rate=0.02, recentre=True)
    a, b = to_double(skewed_state(plain, 8)), to_double(skewed_state(recentred, 8))
    assert abs(a.price.mean()) > 1e-3
    assert abs(b.price.mean()) < 1e-8
    torch.testing.assert_close(a.price - a.price.mean(), b.price, atol=1e-7, rtol=0)


# --- quantile ---------------------------------------------------------------------------------


def exact_quantile_price(affinities, price, top_k):
    """K/E upper quantiles over tokens of a − α, α the (K+1)-th largest of a − price."""
    num_experts = affinities.shape[-1]
    ranked = np.sort(affinities - price, axis=-1)
    margin = affinities - ranked[:, -(top_k + 1)][:, None]
    return np.quantile(margin, 1 - top_k / num_experts, axis=0)


def bin_width(value, bins):
    """Width at `value` of a bin of the signed cube on [−2, 2], from its two edges."""
    position = (np.cbrt(value / 2) + 1) / 2
    low = np.floor(position * bins) / bins
    low, high = (2 * (2 * edge - 1) ** 3 for edge in (low - 1 / bins, low + 2 / bins))
    return (high - low) / 3


@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=repr)
@pytest.mark.parametrize("bins", [200, 1000])
def test_quantile_price_is_within_a_bin_of_the_exact_quantile(gate, bins):
    method = QuantileBalancing(bins=bins)
    state = SelectionPrice(torch.linspace(-0.05, 0.05, 8, dtype=torch.float64))
    logits = random_logits(4000, 8, dtype=torch.float64)
    experts = method.preference(state, gate, logits, mask=None, training=True).topk(2).indices
    routing = route(logits, experts, gate)
    found = method.update(state, method.observe(state, routing)).price.numpy()
    exact = exact_quantile_price(gate.affinities(logits).numpy(), state.price.numpy(), 2)
    width = bin_width(exact, bins)
    # Centring mixes the errors of all experts, each at most a bin, into every price.
    error = np.abs(found - (exact - exact.mean()))
    assert (error <= width + width.mean()).all()


@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=repr)
def test_one_quantile_update_brings_maxvio_from_2_9_below_0_6(gate):
    before, after = one_update(gate)
    assert before > 2.5
    assert after < 0.6


def one_update(gate):
    method = QuantileBalancing()
    state, violations = method.init(16), []
    for seed in (0, 1):
        logits = skewed_logits(4096, 16, seed)
        ranked = method.preference(state, gate, logits, mask=None, training=True)
        sums = method.observe(state, route(logits, ranked.topk(2).indices, gate))
        violations.append(metrics.max_violation(sums.counts).item())
        state = method.update(state, sums)
    return violations


def test_quantile_settles_at_the_noise_of_two_batches():
    """One batch sets the price, another is routed by it: √2 of the sampling floor of 0.21."""
    _, after = steer(QuantileBalancing(), Softmax(), steps=40)
    assert after < 0.3


def test_quantile_histogram_holds_every_real_token_once_per_expert():
    method = QuantileBalancing(bins=64)
    routing = random_routing(padded=True)
    (histogram,) = method.observe(method.init(8), routing).extra
    assert torch.equal(histogram.sum(-1), routing.mask.sum().float().expand(8))


def test_quantile_histogram_of_two_ranks_adds_to_the_price_of_both_together():
    method = QuantileBalancing()
    state = method.init(8)
    a, b = random_routing(seed=1), random_routing(seed=2)
    apart = add(method.observe(state, a), method.observe(state, b))
    together = method.observe(state, concatenated([a, b]))
    assert torch.equal(method.update(state, apart).price, method.update(state, together).price)


def test_quantile_takes_a_router_that_uses_all_experts():
    method = QuantileBalancing()
    routing = random_routing(num_experts=4, top_k=4)
    state = method.update(method.init(4), method.observe(method.init(4), routing))
    assert torch.isfinite(state.price).all()


# --- Sinkhorn ---------------------------------------------------------------------------------


def sinkhorn_knopp(kernel, iterations):
    """Alternate the scaling of rows to mass 1 and columns to mass T/E, in plain space."""
    tokens, num_experts = kernel.shape
    columns = np.ones(num_experts)
    for _ in range(iterations):
        rows = 1 / (kernel @ columns)
        columns = tokens / num_experts / (kernel.T @ rows)
    return columns


@pytest.mark.parametrize("gate", [Softmax(), Sigmoid()], ids=repr)
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_sinkhorn_knopp(gate, iterations):
    method = Sinkhorn(iterations=iterations, temperature=0.7)
    logits = random_logits(40, 8, dtype=torch.float64)
    affinities = gate.affinities(logits).numpy()
    columns = sinkhorn_knopp(affinities ** (1 / 0.7), iterations)
    ranked = method.preference((), gate, logits, mask=None, training=True)
    found = ranked - gate.log_affinity(logits) / 0.7
    expected = np.log(columns)
    np.testing.assert_allclose(
        (found - found.mean(-1, keepdim=True)).numpy(),
        np.broadcast_to(expected - expected.mean(), found.shape),
        atol=1e-12,
    )


def test_sinkhorn_plan_gives_every_expert_the_same_mass():
    method = Sinkhorn(iterations=200)
    logits = random_logits(64, 8, dtype=torch.float64)
    plan = method.preference((), Softmax(), logits, mask=None, training=True).softmax(-1)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 8.0, dtype=torch.float64))


def test_sinkhorn_balances_a_skewed_batch_in_training_and_leaves_evaluation_alone():
    method, logits = Sinkhorn(), skewed_logits(1024, 16, 0)
    assert method.preference((), Softmax(), logits, mask=None, training=False) is None
    ranked = method.preference((), Softmax(), logits, mask=None, training=True)
    counts = [measure(route(logits, r.topk(2).indices, Softmax())).counts for r in (logits, ranked)]
    before, after = (metrics.max_violation(c).item() for c in counts)
    assert before > 2.5
    assert after < 0.2


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
        gradient = gradient + part.logit_gradient(own, alone)
        term = term + part.penalty(own, alone)
    torch.testing.assert_close(both.logit_gradient(state, batch), gradient)
    torch.testing.assert_close(both.penalty(state, batch), term)
    assert torch.equal(both.price(state), states[2].price)

    after = both.update(state, batch.sums)
    alone = one_batch(quantile, states[2], routing)
    assert torch.equal(after.second.price, quantile.update(states[2], alone.sums).price)
    expected = phi.update(states[0], one_batch(phi, states[0], routing).sums)
    assert all(torch.equal(a, b) for a, b in zip(tensors(after.first.first), expected, strict=True))


def test_together_takes_its_parts_in_either_order():
    phi, loss_free = PhiBalancing(strength=0.1), LossFree(rate=0.1)
    one, other = Together(phi, loss_free), Together(loss_free, phi)
    a, b = skewed_state(one, 8), skewed_state(other, 8)
    assert torch.equal(one.price(a), other.price(b))
    routing = random_routing()
    assert torch.equal(
        one.logit_gradient(a, one_batch(one, a, routing)),
        other.logit_gradient(b, one_batch(other, b, routing)),
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LossFree(), QuantileBalancing()),
        (Sinkhorn(), LossFree()),
        (Together(PhiBalancing(), LossFree()), Sinkhorn()),
    ],
    ids=lambda balancer: type(balancer).__name__,
)
def test_two_methods_that_both_choose_experts_are_refused(first, second):
    with pytest.raises(ValueError, match="both choose experts"):
        Together(first, second)


def test_together_refuses_what_is_no_balancer():
    with pytest.raises(TypeError, match="composes balancers"):
        Together(PhiBalancing(), "loss-free")


def test_no_balancing_watches_and_pulls_no_lever():
    method = NoBalancing()
    batch = one_batch(method, (), random_routing())
    assert batch.sums.counts.sum() == 48
    assert not method.charges
    assert not method.selects
    assert method.penalty((), batch) is None


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: SwitchLoss(strength=-1.0), "strength"),
        (lambda: GlobalBatchLoss(strength=float("inf")), "strength"),
        (lambda: SequenceLoss(strength=-0.1), "strength"),
        (lambda: ZLoss(strength=-0.1), "strength"),
        (lambda: LossFree(rate=-0.1), "rate"),
        (lambda: LossFree(rule="signum"), "rule"),
        (lambda: QuantileBalancing(bins=1), "bins"),
        (lambda: Sinkhorn(iterations=0), "iterations"),
        (lambda: Sinkhorn(temperature=0.0), "temperature"),
    ],
)
def test_impossible_hyper_parameters_are_refused_by_name(build, name):
    with pytest.raises(ValueError, match=name):
        build()
