"""The doctor of runs reads what a method does from the log's header."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnosis_runs import FREE, HARD, PHI, findings, skewed
from moebalance import methods
from moebalance.methods.describe import describe
from moebalance.report.parts import balances, parse, parts_of
from moebalance.runlog import Run
from moebalance.words.methods import method_classes
from synthetic_runs import planted


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
