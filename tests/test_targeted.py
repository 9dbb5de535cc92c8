"""A goal instead of a coefficient: what goals measure, how the strength is steered to them."""

from __future__ import annotations

import math

import pytest
import torch

import moebalance as mb
from moebalance import MaxVio, Method, Targeted, metrics
from moebalance.methods import EntropyDeficit, Gini, RankVio
from moebalance.methods.targeted import Steered
from moebalance.routing import Sums
from moebalance.words.methods import build_method

LOAD = torch.tensor([0.4, 0.3, 0.2, 0.1])


def sums(load: torch.Tensor, tokens: float = 512.0) -> Sums:
    return Sums(load * tokens, load * tokens * 2, torch.tensor(tokens))


def steered(loads: list[torch.Tensor], method: Targeted) -> Steered:
    state = method.init(len(loads[0]))
    for load in loads:
        state = method.update(state, sums(load))
    return state


# --- goals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "measured"),
    [
        (MaxVio(0.3), metrics.max_violation(LOAD)),
        (Gini(0.1), metrics.gini(LOAD)),
        (EntropyDeficit(0.02), 1 - metrics.normalized_entropy(LOAD)),
        (RankVio(0.2, ep_size=2), torch.tensor(0.4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_goal_measures_as_its_metric_does(goal, measured):
    torch.testing.assert_close(goal.measure(LOAD), measured)
    assert goal.ratio(LOAD).item() == pytest.approx(measured.item() / goal.at_most)
    assert goal.ratio(torch.full((4,), 0.25)).item() == pytest.approx(0, abs=1e-5)


def test_a_goal_is_about_the_load_that_it_names():
    both = Sums(LOAD, LOAD.flip(0), torch.tensor(1.0))
    assert torch.equal(MaxVio(1.0).of(both), LOAD.flip(0))
    assert torch.equal(MaxVio(1.0, load="soft").of(both), LOAD)
    assert Targeted(mb.PhiBalancing(), MaxVio(1.0)).traits.shared == {"scores", "counts"}
    assert Targeted(mb.PhiBalancing(), MaxVio(1.0, load="soft")).traits.shared == {"scores"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MaxVio(0.0), "at_most=0.0"),
        (lambda: Gini(0.1, load="firm"), "'hard' or 'soft'"),
        (lambda: RankVio(0.1, ep_size=1), "at least 2"),
        (lambda: RankVio(0.1, ep_size=3).measure(LOAD), "cannot be shared out to 3 ranks"),
        (lambda: Targeted(mb.LossFree(), MaxVio(0.1)), "steers a strength that balances"),
        (lambda: Targeted(mb.ZLoss(), MaxVio(0.1)), "steers a strength that balances"),
        (lambda: Targeted(mb.recommended(), MaxVio(0.1)), r"parts: Together\(Targeted\(…\), …\)"),
        (lambda: Targeted(mb.PhiBalancing(), MaxVio(0.1), gain=0.0), "gain=0.0"),
        (lambda: Targeted(mb.PhiBalancing(), MaxVio(0.1), ceiling=0.5), "ceiling=0.5"),
        (lambda: Targeted(mb.PhiBalancing(), MaxVio(0.1), rate=2.0), r"rate=2\.0"),
    ],
)
def test_what_cannot_work_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_number_is_no_goal():
    with pytest.raises(TypeError, match=r"MaxVio\(0\.3\)"):
        Targeted(mb.PhiBalancing(), 0.3)


# --- the controller -----------------------------------------------------------------------------


def test_at_its_start_it_is_the_method_itself():
    """Law with a plain method: until λ moves, charge and memory are the method's own."""
    plain = mb.PhiBalancing(strength=0.02, load="hard")
    method = Targeted(plain, MaxVio(0.3))
    state = method.init(4)
    assert method.multiplier(state) == 1
    batch = mb.routing.Batch(None, sums(LOAD), sums(LOAD))
    torch.testing.assert_close(
        method.loss_price(state, batch), plain.loss_price(state.inner, batch)
    )
    after, alone = method.update(state, sums(LOAD)), plain.update(plain.init(4), sums(LOAD))
    torch.testing.assert_close(after.inner, alone)


def test_a_load_that_stays_uneven_raises_the_strength_up_to_the_ceiling_and_no_further():
    method = Targeted(mb.PhiBalancing(), MaxVio(0.1), gain=0.02, ceiling=20.0)
    halfway = method.multiplier(steered([LOAD] * 40, method)).item()
    assert halfway == pytest.approx(math.exp(0.02 * 40), rel=1e-4)
    wound_up = steered([LOAD] * 400, method)
    assert method.multiplier(wound_up).item() == pytest.approx(20.0)
    # No wind-up: it comes down as soon as the load is even, not after 250 steps more.
    even = [torch.full((4,), 0.25)] * 150
    for load in even:
        wound_up = method.update(wound_up, sums(load))
    assert method.multiplier(wound_up).item() < 2.5


def test_an_even_stretch_is_forgotten_as_any_other():
    """λ is not held as if a load were on its way because it had been perfectly even once."""
    method = Targeted(mb.PhiBalancing(), MaxVio(0.4), gain=0.01, rate=1.0)
    even = torch.full((4,), 0.25)
    below = torch.tensor([1.16, 0.84, 1.0, 1.0]) / 4  # 0.4 of what is allowed
    state = steered([even] * 300, method)
    start = state.log_dual.item()
    for _ in range(600):
        state = method.update(state, sums(below))
    assert state.log_dual.item() < start - 1.5


@pytest.mark.parametrize(("violation", "strength"), [(0.2, 0.5), (0.4, 1.0), (0.8, 1.0)])
def test_a_load_more_even_than_its_goal_is_braked_at_once_and_none_is_pushed(violation, strength):
    """Before λ has moved."""
    method = Targeted(mb.PhiBalancing(), MaxVio(0.4), gain=1e-4, rate=1.0)
    load = torch.tensor([1 + violation, 1 - violation, 1.0, 1.0]) / 4
    assert method.multiplier(steered([load], method)).item() == pytest.approx(strength, rel=1e-3)


def test_a_layer_that_is_balanced_anyway_ends_without_any_charge():
    method = Targeted(mb.PhiBalancing(), MaxVio(0.5), gain=0.05)
    state = steered([torch.tensor([0.26, 0.25, 0.25, 0.24])] * 300, method)
    assert method.multiplier(state).item() == 0
    batch = mb.routing.Batch(None, sums(LOAD), sums(LOAD))
    assert method.loss_price(state, batch).abs().max().item() == 0


def test_a_load_on_its_way_is_left_alone():
    def falling(rate: float) -> list[torch.Tensor]:
        even, first = torch.full((4,), 0.25), LOAD - 0.25
        return [even + first * math.exp(-rate * step) for step in range(200)]

    method = Targeted(mb.PhiBalancing(), MaxVio(0.01), gain=0.02)
    stuck, moving = (method.multiplier(steered(falling(r), method)) for r in (0.0, 0.01))
    assert stuck.item() > 25
    assert moving.item() < 1.3


def test_a_step_without_tokens_changes_nothing():
    method = Targeted(mb.PhiBalancing(), MaxVio(0.1))
    state = steered([LOAD] * 3, method)
    torch.testing.assert_close(method.update(state, sums(LOAD, tokens=0.0)), state)


def test_noise_of_sampling_alone_does_not_move_it_far():
    """At the goal: λ stays within a factor of two over a thousand steps, r within its noise."""
    generator = torch.Generator().manual_seed(0)
    proportions = torch.full((16,), 14.75 / 15 / 16)
    proportions[0] = 1.25 / 16
    method = Targeted(mb.PhiBalancing(), MaxVio(0.25))
    state, course = method.init(16), []
    for _ in range(1000):
        drawn = torch.multinomial(proportions, 2048, replacement=True, generator=generator)
        load = torch.bincount(drawn, minlength=16) / 2048
        state = method.update(state, sums(load))
        course.append((state.log_dual.item(), method.multiplier(state).log().item()))
    assert max(abs(dual) for dual, _ in course) < math.log(2)
    assert max(abs(both) for _, both in course[50:]) < math.log(2)


class Follower:
    """A router that goes to a price with a lag: log load follows −push · price, by 2 % a step."""

    def __init__(self, preference: torch.Tensor, sensitivity: float) -> None:
        self.preference, self.sensitivity = preference, sensitivity
        self.logits = preference.clone()

    def step(self, method: Method, state: Steered) -> Steered:
        load = self.logits.softmax(-1)
        price = method.loss_price(state, mb.routing.Batch(None, sums(load), sums(load)))
        goal = self.preference - self.sensitivity * price
        self.logits += 0.02 * (goal - self.logits)
        return method.update(state, sums(load))


@pytest.mark.parametrize("sensitivity", [100.0, 300.0, 3000.0])
@pytest.mark.parametrize("target", [0.2, 0.6])
def test_one_setting_reaches_its_goal_whatever_the_router_answers(sensitivity, target):
    """A fixed strength leaves what it leaves; the controller ends within a fifth of the goal."""
    preference = 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(3))

    def ends_at(method: Method, state) -> float:
        router, last = Follower(preference.clone(), sensitivity), []
        for _ in range(3000):
            state = router.step(method, state)
            last.append(metrics.max_violation(router.logits.softmax(-1)).item())
        assert max(last[-300:]) - min(last[-300:]) < 0.2 * target  # settled, no hunting
        return last[-1]

    plain = mb.PhiBalancing(strength=0.01, rate=0.1, unit="paper")
    method = Targeted(plain, MaxVio(target, load="soft"))
    assert ends_at(method, method.init(16)) == pytest.approx(target, rel=0.2)


def test_one_state_a_layer_through_a_model():
    router = mb.BalancedRouter(
        Targeted(mb.PhiBalancing(load="hard"), MaxVio(0.1), gain=0.1), num_experts=8, top_k=2
    )
    with mb.attach(router) as balancing:
        torch.manual_seed(0)
        for _ in range(5):
            logits = (torch.randn(64, 8) + torch.arange(8.0)).requires_grad_()
            weights, _ = router(logits)
            weights.sum().backward()
            balancing.step()
        state = router.state
        assert state.log_dual.item() == pytest.approx(0.5, rel=1e-3)


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "goal"),
    [
        ("phi(target=0.3)", MaxVio(0.3)),
        ("phi(target={'name': 'Gini', 'at_most': 0.1})", Gini(0.1)),
        (
            "phi(target={'name': 'RankVio', 'at_most': 0.1, 'ep_size': 4, 'load': 'soft'})",
            RankVio(0.1, load="soft", ep_size=4),
        ),
    ],
)
def test_a_target_in_words(words, goal):
    assert build_method(words) == Targeted(mb.PhiBalancing(), goal)


def test_a_target_is_an_option_of_every_method_that_charges_and_composes():
    method = build_method("switch(strength=0.1, target=0.3)+loss-free")
    assert method.methods[0] == Targeted(mb.SwitchLoss(strength=0.1), MaxVio(0.3))
    with pytest.raises(ValueError, match="steers a strength that balances"):
        build_method("loss-free(target=0.3)")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("{'name': 'Ginni', 'at_most': 0.1}", "Did you mean 'Gini'"),
        ("{'at_mots': 0.1}", "Did you mean 'at_most'"),
        ("{'name': 'Gini'}", "needs at_most"),
    ],
)
def test_a_misspelt_target_is_refused(target, says):
    with pytest.raises(ValueError, match=says):
        build_method(f"phi(target={target})")
