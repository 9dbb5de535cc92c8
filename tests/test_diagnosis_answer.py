"""`moebalance doctor RUN`: one answer a method, however many rules speak."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from diagnosis_runs import (
    EXPERTS,
    FREE,
    HARD,
    NONE,
    PHI,
    STEPS,
    dying,
    even,
    falling,
    judged,
    skewed,
    turning,
    waves,
)
from moebalance.lab.cli import app
from moebalance.report.diagnosis import Severity, counted, diagnose, render
from moebalance.runlog import Run
from synthetic_runs import planted, write_run


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
    """Runs of three seeds with this load, whose loss is above the loss without balancing."""
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
