"""`moebalance doctor RUN`: a run and its balance, where they have a fault and nearly have one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diagnosis_runs import FREE, HARD, NONE, PHI, STEPS, dying, even, falling, findings, skewed
from moebalance.report.diagnosis import Severity
from moebalance.runlog import Run
from synthetic_runs import made, planted

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
