"""Fuzz: whatever some ranks crash at, repeat, skip or reorder, no sums of two steps are mixed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzzing import fuzz
from rank_programs import CALM, FAULTS, INSERTED, STYLES, Fault, Plan, problem, run


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    ranks, steps = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    plan = Plan(ranks, draw(st.sampled_from(list(STYLES))), steps, optimizer=draw(st.booleans()))
    places = st.tuples(st.integers(0, ranks - 1), st.integers(0, steps - 1))
    # Without an optimizer, or before its first step, ranks count the same number of batches.
    if plan.optimizer:
        later = places.filter(lambda place: place[1] > 0 or "before" not in plan.style)
        plan.batches = draw(st.dictionaries(later, st.integers(1, 3), max_size=3))
    else:
        number = draw(st.integers(1, 3))
        plan.batches = {(r, s): number for r in range(ranks) for s in range(steps + CALM)}
    fault = st.builds(Fault, st.sampled_from(FAULTS), st.integers(0, 3), st.sampled_from(INSERTED))
    # Two faults may make up for each other: on one rank a step() too few and one too many, and
    # without an optimizer a step() too few here and a batch too many there.
    at_fault = st.sets(st.integers(0, ranks - 1), max_size=2 if plan.optimizer else 1)
    plan.faults = {(r, draw(st.integers(0, steps - 1))): draw(fault) for r in draw(at_fault)}
    if draw(st.integers(0, 3)) == 0:  # all ranks alike
        plan.faults = {(r, 0): each for each in plan.faults.values() for r in range(ranks)}
    return plan


@pytest.mark.survives(
    "Ranks",
    "Any rank crashes, repeats, skips, reorders, inserts or loads, in loops made at random",
    "error: on every rank, or the right sums on all",
)
@fuzz("rank protocol: loops that crash, repeat, skip, reorder, drop or load", 300)
@given(plans())
def test_every_run_ends_in_the_right_sums_or_in_an_error_on_every_rank(plan: Plan) -> None:
    assert not problem(*run(plan))
