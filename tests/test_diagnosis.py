"""`moebalance doctor RUN`: each rule on runs that have its fault, and that nearly have it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moebalance import methods
from moebalance.lab.cli import app
from moebalance.methods.describe import describe
from moebalance.report.diagnosis import (
    Diagnosis,
    Finding,
    Severity,
    counted,
    diagnose,
    examine,
    render,
)
from moebalance.report.parts import balances, parse, parts_of
from moebalance.runlog import Run
from moebalance.words.methods import method_classes
from synthetic_runs import made, planted, write_run

PHI = "PhiBalancing(potential=NegativeEntropy(), strength=0.03, rate=0.05, load='soft')"
HARD = PHI.replace("soft", "hard")
FREE = "LossFree(speed=0.001, rule='sign', recentre=False)"
NONE = "NoBalancing()"
STEPS, LAYERS, EXPERTS = 300, 2, 16


def even(steps: int = STEPS, spread: float = 0.08, seed: int = 5) -> np.ndarray:
    """Loads that have settled near an even share, each layer in its own way."""
    shares = 1 + spread * np.random.default_rng(seed).uniform(-1, 1, (LAYERS, EXPERTS))
    return np.broadcast_to(shares, (steps, LAYERS, EXPERTS)).copy()


def skewed(factor: float, *, layers: tuple[int, ...] = (0, 1), steps: int = STEPS) -> np.ndarray:
    """Even but for one expert with so many times its share."""
    load = even(steps)
    for layer in layers:
        load[:, layer, 3] = factor * (EXPERTS - 1) / (EXPERTS - factor)
    return load


def turning(factor: float) -> np.ndarray:
    """Skewed, by an expert that is not the same at first and at the end: the router does move."""
    load = skewed(factor)
    load[:10] = load[:10, :, ::-1]
    return load


def waves(period: float, size: float = 0.4, steps: int = STEPS) -> np.ndarray:
    """Even, but layer 0 swings, each expert in its own phase."""
    load = even(steps)
    phase = np.random.default_rng(1).uniform(0, 2 * math.pi, EXPERTS)
    load[:, 0] += size * np.sin(2 * math.pi * np.arange(steps)[:, None] / period + phase)
    return load


def findings(run: Run, *beside: Run) -> dict[str, Finding]:
    (_, found), *_ = examine([run, *beside])
    return {finding.rule: finding for finding in found}


# --- healthy runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PHI, HARD, FREE])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_wrong_with_an_even_run(method, seed):
    run = planted(method, even(seed=seed), seed=seed)
    assert {f.severity for f in findings(run).values()} <= {Severity.OK}


def test_a_run_as_even_as_chance_allows_is_told_that_there_is_nothing_to_do():
    found = findings(planted(HARD, even(spread=0.0), tokens=512))
    assert set(found) == {"at-the-floor"}
    assert found["at-the-floor"].severity is Severity.OK
    assert "at-the-floor" not in findings(planted(HARD, even(spread=0.3), tokens=8192))


# --- the run itself -----------------------------------------------------------------------------


def test_a_failed_run_is_an_error_and_a_stopped_one_a_note():
    failed = {"kind": "end", "status": "failed", "error": "ValueError: no"}
    found = findings(planted(HARD, even(), end=failed))["unfinished"]
    assert found.severity is Severity.ERROR
    assert "ValueError: no" in found.because
    stopped = findings(planted(HARD, even(), end={"kind": "end", "status": "interrupted"}))
    assert stopped["unfinished"].severity is Severity.NOTE
    assert "unfinished" not in findings(planted(HARD, even()))


def test_a_short_run_is_not_judged():
    short = findings(planted(PHI, skewed(8, steps=99)))
    assert "too-short" in short
    assert "uneven" not in short
    assert "too-short" not in findings(planted(PHI, skewed(8, steps=100)))


def test_an_archived_log_without_step_rows_is_judged_by_its_end_only():
    (run,) = made(phi={"loss": [2.0], "maxvio": [0.4]})
    long = Run(
        run.path, run.header, evals=({**run.evals[0], "step": 500},), end={"status": "complete"}
    )
    assert set(findings(long)) == {"few-rows"}


def test_a_loss_that_is_not_a_number_is_an_error_with_its_step():
    loss = np.full(STEPS, 2.0)
    loss[120:] = math.nan
    found = findings(planted(HARD, even(), loss=loss))["not-finite"]
    assert found.severity is Severity.ERROR
    assert "step 121" in found.what


def falling(rise: float, seed: int = 0) -> np.ndarray:
    """A loss that falls by 3 and rises again by so much over the last third."""
    time = np.linspace(0, 1, STEPS)
    noise = np.random.default_rng(seed).normal(0, 0.05, STEPS)
    return 2 + 3 * np.exp(-8 * time) + rise * np.clip(3 * time - 2, 0, 1) + noise


def test_a_loss_that_rises_for_good_has_diverged():
    assert "diverged" in findings(planted(HARD, even(), loss=falling(1.0)))
    assert "diverged" not in findings(planted(HARD, even(), loss=falling(0.1)))
    shifted = planted(HARD, even(), loss=falling(1.0), batching="shift")
    assert "diverged" not in findings(shifted)


def test_a_spike_is_told_with_its_step_and_noise_is_not():
    loss = falling(0.0)
    assert "spikes" not in findings(planted(HARD, even(), loss=loss))
    loss[199] += 1.5
    found = findings(planted(HARD, even(), loss=loss))
    assert "step 200" in found["spikes"].what
    assert "diverged" not in found


# --- balance ------------------------------------------------------------------------------------


def dying(at: int, experts: tuple[int, ...] = (2, 7)) -> np.ndarray:
    load = even()
    load[at:, 1, experts] = 1e-4
    return load


@pytest.mark.parametrize(("at", "when"), [(20, "early"), (200, "late")])
def test_dead_experts_are_named_with_their_layer_and_when_they_died(at, when):
    found = findings(planted(HARD, dying(at)))["dead"]
    assert "layer 1 has 2 experts (2, 7) dead" in found.what
    assert f"since step {at + 1}, {when}" in found.what
    assert found.layers == (1,)


def test_a_rare_expert_is_not_dead_nor_one_that_chance_left_out():
    load = even()
    load[:, 0, 3] = 0.05
    assert "dead" not in findings(planted(HARD, load))
    few = planted(HARD, dying(0), tokens=16, every=STEPS)
    assert "dead" not in findings(few)


def test_a_layer_far_worse_than_the_others_is_told_and_a_somewhat_worse_one_is_not():
    found = findings(planted(HARD, skewed(3, layers=(1,))))["one-layer"]
    assert found.layers == (1,)
    assert "target=" in found.do
    mild = skewed(1.9)
    mild[:, 1] = skewed(3)[:, 1]
    assert "one-layer" not in findings(planted(HARD, mild))


def test_a_load_that_stays_uneven_asks_for_a_larger_strength():
    found = findings(planted(HARD, skewed(4)))["uneven"]
    assert found.severity is Severity.WARNING
    assert "from 0.03 to about 0.09" in found.do
    assert "uneven" not in findings(planted(HARD, skewed(1.8)))


def test_a_load_on_its_way_is_a_note():
    load = skewed(1)
    load[:, :, 3] = 1 + 9 * np.exp(-np.arange(STEPS) / 130)[:, None]
    found = findings(planted(HARD, load))["uneven"]
    assert found.severity is Severity.NOTE
    assert "on its way" in found.what


def test_without_a_method_it_is_told_to_attach_one_and_with_loss_free_to_raise_the_rate():
    assert "Attach" in findings(planted(NONE, skewed(4), method="none"))["uneven"].do
    assert "loss-free from 0.001" in findings(planted(FREE, skewed(4)))["uneven"].do


def test_soft_even_and_hard_not_is_a_gap_and_not_a_weak_strength():
    found = findings(planted(PHI, skewed(3), soft=even()))
    assert "load='hard'" in found["soft-hard-gap"].do
    assert "uneven" not in found


@pytest.mark.parametrize(
    ("method", "soft"),
    [(HARD, even()), (f"Together({PHI}, {FREE})", even()), (PHI, skewed(2))],
)
def test_no_gap_where_the_hard_load_is_charged_or_the_soft_one_is_uneven_too(method, soft):
    assert "soft-hard-gap" not in findings(planted(method, skewed(3), soft=soft))


def worsening(late: float) -> np.ndarray:
    load = even()
    rise = np.clip(np.linspace(-1, 1, STEPS), 0, 1)[:, None]
    load[:, :, 3] = 1.5 + (late - 1.5) * rise
    return load


def test_a_balance_that_gets_worse_is_a_drift_and_one_that_stays_is_not():
    assert "drift" in findings(planted(HARD, worsening(2.3)))
    assert "drift" not in findings(planted(HARD, worsening(1.55)))
    assert "drift" not in findings(planted(HARD, worsening(2.3)[::-1]))


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
    assert "from 0.001 to about 0.0001" in found.do
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


# --- words --------------------------------------------------------------------------------------


def test_a_header_says_what_each_part_does_whatever_its_class_is_called():
    class Mine(methods.SwitchLoss):
        pass

    both = methods.Together(
        methods.Targeted(Mine(strength=0.1), methods.MaxVio(0.3)), methods.LossFree()
    )
    run = Run(Path("x"), {"method": "mine", "parts": describe(both)})
    found = parts_of(run)
    assert [part.kind for part in found] == ["Targeted", "Mine", "LossFree"]
    assert [part.charges for part in found] == [True, True, False]
    assert [part.selects for part in found] == [False, False, True]
    assert found[0].settings["goal"].startswith("MaxVio(at_most=0.3")
    assert json.loads(json.dumps(run.header["parts"])) == run.header["parts"]


def test_every_method_balances_but_no_balancing_and_the_router_z_loss():
    found = {
        word: balances(parts_of(Run(Path("x"), {"method": word, "parts": describe(kind())})))
        for word, kind in method_classes().items()
    }
    assert {word for word, does in found.items() if does is False} == {"none", "z-loss"}
    assert None not in found.values()


def test_a_method_is_read_back_from_its_repr():
    both = parse(f"Together(Targeted(method={PHI}, goal=MaxVio(at_most=0.3)), {FREE})")
    assert [part.kind for part in both] == ["Targeted", "PhiBalancing", "LossFree"]
    assert both[1].number("strength") == 0.03
    assert both[1].rate(1024) == 0.05
    assert parse("PhiBalancing(strength=0.1, memory_tokens=100)")[0].rate(100) == pytest.approx(
        1 - math.exp(-1)
    )
    assert parse("not a repr at all") == ()
    assert parse("PhiBalancing(rate='auto')")[0].rate(1) is None


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(alphabet="Phi(strength=0.1, ').+\x00Ωη", max_size=60))
def test_whatever_stands_in_the_log_for_the_method_is_read_without_an_error(text):
    parse(text)


@pytest.mark.parametrize("parts", [None, [], "phi", [1], [{"kind": 3}], [{"kind": "A"}]])
def test_a_log_without_parts_is_judged_by_its_repr_without_guessing_what_the_method_does(parts):
    run = planted(HARD, skewed(4))
    old = Run(
        run.path, {**run.header, "parts": parts}, run.steps, run.snapshots, run.evals, run.end
    )
    assert [part.kind for part in parts_of(old)] == ["PhiBalancing"]
    found = findings(old)
    assert "uneven" in found
    assert found["uneven"].do == ""  # more of what? the log does not say
    assert "never-acted" not in found


# --- one answer -----------------------------------------------------------------------------------


def judged(*runs: Run) -> Diagnosis:
    """The diagnosis of the first run's method."""
    return diagnose(runs)[0]


def test_one_fault_gives_its_own_advice():
    found = judged(planted(HARD, turning(4)))
    assert [evidence.finding.rule for evidence in found.evidence] == ["uneven"]
    assert found.advice == found.evidence[0].finding.do
    assert found.severity is Severity.WARNING


def test_of_two_faults_the_cause_is_mended_first_and_both_are_told():
    load = turning(4)
    load[:, 0] += 0.6 * waves(25)[:, 0] - 0.6
    found = judged(planted(HARD, load))
    rules = [evidence.finding.rule for evidence in found.evidence]
    assert rules[0] == "oscillation"
    assert "uneven" in rules
    assert found.advice == found.evidence[0].finding.do


def costly(load: np.ndarray, method: str = HARD, word: str = "phi") -> tuple[Run, ...]:
    """Runs of three seeds with this load, whose loss is above that of those without balancing."""
    bare = [
        planted(NONE, even(), method="none", seed=seed, evals=[{"loss": 2.0}]) for seed in range(3)
    ]
    own = [
        planted(method, load, method=word, seed=seed, evals=[{"loss": 2.2}]) for seed in range(3)
    ]
    return (*own, *bare)


def test_more_pressure_and_less_become_one_answer_that_asks_for_neither_alone():
    found = judged(*costly(turning(4)))
    assert {"uneven", "costs-loss"} <= {evidence.finding.rule for evidence in found.evidence}
    assert found.advice.startswith(
        "Balance by a selection price, and charge less: phi+loss-free with the strength of phi "
        "from 0.03 to about 0.01."
    )
    assert "aise the strength" not in found.advice


def test_with_a_selection_price_at_hand_it_does_more_and_the_loss_less():
    both = f"Together({HARD}, {FREE})"
    found = judged(*costly(turning(4), both, "phi+loss-free"))
    assert found.advice == (
        "Let the selection price do more, and the loss less: speed of loss-free from 0.001 to "
        "about 0.003, strength of phi from 0.03 to about 0.01."
    )


def test_a_gap_that_no_strength_reaches_is_not_answered_with_more_strength():
    load = turning(3)
    load[:, 1, 7] = 1e-4  # an expert is dead as well, which alone asks for more
    found = judged(planted(PHI, load, soft=even()))
    assert {"soft-hard-gap", "dead"} <= {evidence.finding.rule for evidence in found.evidence}
    assert found.advice.startswith("A larger strength does not reach this.")


def test_seeds_are_one_paragraph_that_says_in_how_many_each_fault_is():
    load = dying(20)
    runs = [planted(HARD, load if seed < 2 else even(), seed=seed) for seed in range(3)]
    found = judged(*runs)
    assert [(e.finding.rule, e.where) for e in found.evidence] == [
        ("dead", "in 2 of 3 runs, here seed 0")
    ]
    text = render([found], width=80)
    assert text.startswith(
        "φ-balancing, mixed, seeds 0, 1, 2, 300 steps\n  warning   layer 1 has 2"
    )
    assert text.count("→") == 1


@pytest.mark.parametrize(
    ("method", "word", "advice"),
    [
        (HARD, "phi", "Train longer, then ask again."),
        (
            NONE,
            "none",
            "Attach a method: without one, an expert that is not chosen learns nothing.",
        ),
    ],
)
def test_a_short_run_asks_for_no_other_strength_yet(method, word, advice):
    found = judged(planted(method, dying(20)[:60], method=word))
    assert {"dead", "too-short"} <= {evidence.finding.rule for evidence in found.evidence}
    assert found.advice == advice


def test_what_one_seed_of_many_shows_does_not_decide():
    runs = [planted(HARD, turning(4), seed=seed) for seed in range(3)]
    loss = falling(0.0)
    loss[199] += 1.5
    odd = planted(HARD, turning(4), seed=3, loss=loss, batching="mixed")
    found = judged(*runs, odd)
    assert "spikes" in {evidence.finding.rule for evidence in found.evidence}
    assert "Raise the strength" in found.advice


def test_two_settings_are_headed_by_what_differs_and_reprs_are_not_shown():
    other = HARD.replace("0.03", "0.1")
    text = render(diagnose([planted(HARD, turning(4)), planted(other, turning(4))]), width=80)
    heads = [line for line in text.splitlines() if line.startswith("φ")]
    assert [head.split(",")[0] for head in heads] == [
        "φ-balancing · strength=0.03",
        "φ-balancing · strength=0.1",
    ]
    assert "PhiBalancing" not in text


def test_the_paragraph_of_a_method_has_what_why_and_one_thing_to_do():
    run = planted(HARD, skewed(4))
    text = render(diagnose([run]), width=80)
    # Loads that never move are the worst of it, and come first.
    assert text.startswith(
        "φ-balancing, mixed, seed 0, 300 steps, phi-0\n  error     The loads are"
    )
    assert "→ Routers that are frozen" in text
    assert text.count("→") == 1
    assert all(len(line) <= 80 for line in text.splitlines())
    quiet = render(diagnose([planted(HARD, even(), tokens=65536)]))
    assert "Nothing is found to be wrong" in quiet


def test_a_paragraph_stays_short_however_many_layers_and_rules_speak():
    rng = np.random.default_rng(0)
    load = np.broadcast_to(
        1 + rng.uniform(0, 6, (1, 40, EXPERTS)) ** 2, (STEPS, 40, EXPERTS)
    ).copy()
    load[:, :, :3] = 1e-5
    loss = falling(1.0)
    loss[150] += 4
    run = planted(HARD, load, loss=loss, every=50, end={"kind": "end", "status": "interrupted"})
    (found,) = diagnose([run])
    assert len(found.evidence) >= 5
    text = render([found], width=80)
    assert len(text.splitlines()) <= 24
    assert "  also " in text
    assert "and 39 more layers likewise." in text


def test_findings_are_counted_in_words():
    found = diagnose([planted(HARD, skewed(4)), planted(FREE, turning(4), method="loss-free")])
    assert counted(found) == "1 error, 2 warnings"


def test_doctor_takes_runs_a_paragraph_for_each_method_and_ends_with_1_on_an_error(tmp_path):
    write_run(tmp_path / "a", "phi", steps=120)
    log = write_run(tmp_path / "b", "phi", steps=120) / "log.jsonl"
    whole = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert whole.exit_code == 0, whole.output
    assert " ".join(whole.output.split()).count("φ-balancing, mixed, seeds 0, 0, 120 steps") == 1
    lines = log.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[60]) | {"loss": None}
    log.write_text("\n".join([*lines[:60], json.dumps(row), *lines[61:]]) + "\n", encoding="utf-8")
    broken = CliRunner().invoke(app, ["doctor", str(log)])
    assert broken.exit_code == 1
    assert "not a finite number" in " ".join(broken.output.split())
