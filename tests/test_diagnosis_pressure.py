"""`moebalance doctor RUN`: pressure and movement, where they have a fault and nearly have one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnosis_runs import EXPERTS, FREE, HARD, NONE, PHI, STEPS, even, findings, skewed, waves
from moebalance.report.diagnosis import Severity
from moebalance.runlog import Run
from synthetic_runs import planted

# --- pressure -----------------------------------------------------------------------------------


def test_strength_zero_and_a_price_that_never_moves_are_errors():
    zero = PHI.replace("0.03", "0.0")
    assert findings(planted(zero, even()))["never-acted"].severity is Severity.ERROR
    still = planted(FREE, even(), price_spread=np.zeros(STEPS))
    assert "balancing.step()" in findings(still)["never-acted"].do
    moving = planted(FREE, even(), price_spread=np.linspace(0, 0.1, STEPS))
    assert "never-acted" not in findings(moving)


def test_routers_that_never_move_are_an_error_and_those_that_learn_are_not():
    load = np.broadcast_to(np.exp(np.random.default_rng(0).normal(0, 0.5, EXPERTS)), even().shape)
    assert "frozen" in findings(planted(HARD, load.copy()))["never-acted"].do
    turned = load.copy()
    turned[100:] = turned[100:, :, ::-1]
    assert "never-acted" not in findings(planted(HARD, turned))
    # A router without balancing may stay as it is.
    assert "never-acted" not in findings(planted(NONE, load.copy(), method="none"))


def test_a_loss_above_that_of_the_twin_is_told_beyond_noise_only():
    def run(method_repr: str, loss: float, **more) -> Run:
        return planted(method_repr, even(), evals=[{"loss": loss}], **more)

    twins = [run(NONE, 2.0 + 0.01 * s, method="none", seed=s) for s in (0, 1)]
    found = findings(run(HARD, 2.1), *twins)["costs-loss"]
    assert "2.100, without balancing 2.000 at the same seed" in found.because
    assert "costs-loss" not in findings(run(HARD, 2.015), *twins)
    assert "costs-loss" not in findings(run(HARD, 1.9), *twins)
    other = [run(NONE, 2.0, method="none", batching="one-domain")]
    assert "costs-loss" not in findings(run(HARD, 2.1), *other)


def test_scores_pinned_at_uniform_while_experts_lose_their_domains():
    def run(mi: tuple[float, float], soft: float) -> Run:
        rows = [{"mi": value, "soft_maxvio": soft} for value in mi]
        return planted(HARD, even(), evals=rows)

    assert "0.03 to about 0.01" in findings(run((0.2, 0.01), 0.02))["pinned"].do
    assert "pinned" not in findings(run((0.2, 0.18), 0.02))
    assert "pinned" not in findings(run((0.2, 0.01), 0.2))


@pytest.mark.parametrize(
    ("multiplier", "rule"), [(30.0, "target-out-of-reach"), (0.0, "target-met-alone"), (2.0, None)]
)
def test_a_controller_at_an_end_of_its_range(multiplier, rule):
    steered = f"Targeted(method={HARD}, goal=MaxVio(at_most=0.3), gain=0.01, ceiling=30.0)"
    series = np.full(STEPS, multiplier)
    run = planted(steered, even(), multiplier_most=series, multiplier_least=series)
    ends = {"target-out-of-reach", "target-met-alone"}
    assert set(findings(run)) & ends == ({rule} if rule else set())


# --- movement -----------------------------------------------------------------------------------


def test_an_oscillation_is_told_with_its_period_and_both_ways_out():
    """ω = 2π/25; η → ω²/η is above what a rate may be, α → α (η/ω)²."""
    found = findings(planted(HARD, waves(25)))["oscillation"]
    assert found.layers == (0,)
    assert found.what.startswith("layer 0 oscillates with period 2")
    assert "rate of 0.05 is too small for strength 0.03" in found.what
    assert "strength to about 0.001" in found.do
    slow = findings(planted(HARD.replace("0.05", "0.02"), waves(60, steps=500)))["oscillation"]
    assert "Raise the rate to about 0.5" in slow.do


def test_a_period_counts_steps_where_snapshots_are_rarer():
    found = findings(planted(HARD, waves(50, steps=600), every=5))["oscillation"]
    period = int(found.what.split("period ")[1].split()[0])
    assert period == pytest.approx(50, rel=0.11)


@pytest.mark.parametrize(
    ("method", "load", "every"),
    [
        (HARD, waves(25, size=0.08), 1),  # too small to matter
        (HARD.replace("0.05", "0.6"), waves(25), 1),  # a memory this short damps it
        (HARD, waves(200), 1),  # less than two turns are seen
        (HARD, waves(25), 25),  # snapshots too rare to tell
    ],
)
def test_no_oscillation_is_told_where_none_can_be(method, load, every):
    assert "oscillation" not in findings(planted(method, load, every=every))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), memory=st.sampled_from([0.0, 0.9, 0.97, 1.0]))
def test_noise_and_walks_do_not_oscillate(seed, memory):
    dice = np.random.default_rng(seed)
    walk = np.zeros((STEPS, EXPERTS))
    for t in range(1, STEPS):
        walk[t] = memory * walk[t - 1] + dice.normal(0, 0.05, EXPERTS)
    load = even()
    load[:, 0] *= np.exp(walk - walk.mean(axis=1, keepdims=True))
    assert "oscillation" not in findings(planted(HARD, load, seed=seed))


def test_a_selection_price_that_overshoots():
    load = even()
    signs = np.where(np.arange(EXPERTS) % 2, 1, -1)
    load[:, 0] += 0.5 * signs * np.where(np.arange(STEPS) % 2, 1, -1)[:, None]
    found = findings(planted(FREE, load))["overshoot"]
    assert "from 0.001 to about 0.0001, or use rule='proportional'" in found.do
    already = planted(FREE.replace("'sign'", "'proportional'"), load)
    assert "proportional" not in findings(already)["overshoot"].do
    assert "overshoot" not in findings(planted(FREE, waves(25)))
    assert "overshoot" not in findings(planted(FREE, even(), tokens=128))  # noise of sampling


def test_a_selection_price_that_still_runs_at_full_speed():
    def run(spread: float, load: np.ndarray) -> Run:
        return planted(FREE, load, price_spread=np.linspace(0, spread, STEPS))

    full = 2 * 0.001 * STEPS
    found = findings(run(0.9 * full, skewed(4)))["price-too-slow"]
    assert "0.001 to about 0.01" in found.do
    assert "price-too-slow" not in findings(run(0.2 * full, skewed(4)))
    assert "price-too-slow" not in findings(run(0.9 * full, even()))


def shifted(steps_back: float) -> np.ndarray:
    """Uneven from the change of text on, and back with this time constant."""
    load, half = even(), STEPS // 2
    load[half:, :, 3] += 4 * np.exp(-np.arange(half) / steps_back)[:, None]
    return load


def test_a_slow_return_after_a_change_of_text_asks_for_a_shorter_memory():
    long = HARD.replace("rate=0.05", "rate=0.01")
    found = findings(planted(long, shifted(80), batching="shift"))["slow-recovery"]
    assert "memory is of 100 steps" in found.because
    assert "slow-recovery" not in findings(planted(long, shifted(12), batching="shift"))
    short = HARD.replace("rate=0.05", "rate=0.5")
    assert "slow-recovery" not in findings(planted(short, shifted(80), batching="shift"))
    assert "slow-recovery" not in findings(planted(long, shifted(80)))
