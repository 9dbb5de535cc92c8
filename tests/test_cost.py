"""What imbalance costs under expert parallelism: laws, cases by hand, and the report's table."""

from __future__ import annotations

import doctest
import re
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moebalance.metrics.expert_parallel
import moebalance.report.cost
from moebalance.metrics import max_violation
from moebalance.metrics.expert_parallel import (
    Cost,
    Placement,
    contiguous,
    greedy,
    imbalance_cost,
    rank_violation,
    shuffled,
)
from moebalance.report import summarise
from moebalance.report.cost import cost_table
from moebalance.runlog import find_runs
from synthetic_runs import made, write_run, write_runs

PLACES = (contiguous, greedy, partial(shuffled, seed=3))


@st.composite
def loads_on_ranks(draw: st.DrawFn) -> tuple[list[float], int]:
    """A load of E experts, and a number of ranks that divides E."""
    ep_size = draw(st.integers(1, 6))
    each = draw(st.integers(1, 5))
    counts = st.lists(st.integers(0, 1000), min_size=ep_size * each, max_size=ep_size * each)
    return [float(count) for count in draw(counts.filter(any))], ep_size


def smallest_violation(load: list[float], ep_size: int) -> float:
    """By trying everything."""
    even = contiguous(load, ep_size).rank_of
    return min(rank_violation(load, Placement(ranks, ep_size)) for ranks in permutations(even))


# Laws


@given(st.integers(1, 6), st.integers(1, 5), st.floats(1e-6, 1e6))
def test_an_even_load_costs_nothing(ep_size: int, each: int, value: float) -> None:
    load = [value] * (ep_size * each)
    for place in PLACES:
        cost = imbalance_cost([load, load], ep_size, expert_share=0.7, place=place)
        assert cost.rank_violation == pytest.approx(0, abs=1e-12)
        assert cost.wasted_share == pytest.approx(0, abs=1e-12)


@given(loads_on_ranks())
def test_one_rank_waits_for_nobody(case: tuple[list[float], int]) -> None:
    load, _ = case
    for place in PLACES:
        assert rank_violation(load, place(load, 1)) == pytest.approx(0, abs=1e-12)


@given(loads_on_ranks())
def test_a_rank_is_never_busier_than_its_busiest_expert(case: tuple[list[float], int]) -> None:
    load, ep_size = case
    worst = max_violation(torch.tensor(load, dtype=torch.float64)).item()
    for place in PLACES:
        found = rank_violation(load, place(load, ep_size))
        assert 0 <= found <= min(worst, ep_size - 1) + 1e-12
        assert rank_violation(load, place(load, len(load))) == pytest.approx(worst, abs=1e-12)


@given(loads_on_ranks(), st.randoms(use_true_random=False))
def test_greedy_does_not_care_in_which_order_experts_come(case, random) -> None:
    load, ep_size = case
    other = list(load)
    random.shuffle(other)
    first, second = (rank_violation(x, greedy(x, ep_size)) for x in (load, other))
    assert first == second


@given(loads_on_ranks(), st.floats(1e-3, 1e3))
def test_counts_and_shares_cost_the_same(case: tuple[list[float], int], scale: float) -> None:
    load, ep_size = case
    scaled = [value * scale for value in load]
    one, other = (rank_violation(x, contiguous(x, ep_size)) for x in (load, scaled))
    assert one == pytest.approx(other, abs=1e-9)


@given(loads_on_ranks())
def test_two_ranks_in_one_wait_less(case: tuple[list[float], int]) -> None:
    load, ep_size = case
    doubled = load + load[::-1]
    many = rank_violation(doubled, contiguous(doubled, 2 * ep_size))
    few = rank_violation(doubled, contiguous(doubled, ep_size))
    assert few <= many + 1e-12


@given(
    st.lists(st.integers(1, 50), min_size=6, max_size=6),
    st.sampled_from([2, 3]),
)
def test_greedy_is_near_the_best_there_is(load: list[int], ep_size: int) -> None:
    best = smallest_violation(load, ep_size)
    found = rank_violation(load, greedy(load, ep_size))
    # Three a rank: 4/3 − 1/(3R) (Kellerer and Woeginger, 1993). Two a rank: the best itself.
    bound = {2: 4 / 3 - 1 / 6, 3: 1.0}[ep_size]
    assert best <= found <= (1 + best) * bound - 1 + 1e-12


# Cases by hand


def test_a_small_case_by_hand() -> None:
    load = [4, 2, 1, 1]
    assert contiguous(load, 2).rank_of == (0, 0, 1, 1)
    assert rank_violation(load, contiguous(load, 2)) == 0.5
    assert greedy(load, 2).rank_of == (0, 1, 1, 0)
    assert rank_violation(load, greedy(load, 2)) == 0.25
    assert rank_violation(load, contiguous(load, 4)) == 1.0
    assert rank_violation([0, 0, 0, 8], contiguous(load, 4)) == 3.0


def test_the_cost_is_the_mean_over_layers() -> None:
    found = imbalance_cost([[4, 2, 1, 1], [1, 1, 1, 1]], 2, expert_share=1.0)
    assert found == Cost(rank_violation=0.25, step_factor=1.25, wasted_share=pytest.approx(0.2))
    free = imbalance_cost([[4, 2, 1, 1]], 2, expert_share=0.0)
    assert (free.step_factor, free.wasted_share) == (1.0, 0.0)


def test_each_layer_is_placed_by_its_own_load() -> None:
    loads = [[4, 4, 0, 0], [4, 0, 4, 0]]
    assert imbalance_cost(loads, 2, expert_share=1.0, place=greedy).rank_violation == 0
    assert imbalance_cost(loads, 2, expert_share=1.0).rank_violation == 0.5


def test_random_placements_follow_their_seed_and_average_to_what_theory_says() -> None:
    """One loaded expert among E: whoever holds it has everything, so RankVio = R − 1 always."""
    load = [1.0] + [0.0] * 7
    found = {shuffled(load, 4, seed=seed).rank_of for seed in range(20)}
    assert len(found) > 10
    assert shuffled(load, 4, seed=1) == shuffled(load, 4, seed=1)
    assert all(rank_violation(load, Placement(ranks, 4)) == 3 for ranks in found)
    # Two such experts: together on a rank with chance 1/7, where RankVio is 3, and 1 otherwise.
    pair = [1.0, 1.0] + [0.0] * 6
    values = [rank_violation(pair, shuffled(pair, 4, seed=seed)) for seed in range(2000)]
    assert set(values) == {1.0, 3.0}
    assert sum(values) / 2000 == pytest.approx(1 + 2 / 7, abs=0.05)


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda: contiguous([1] * 6, 4), r"must be one of \[1, 2, 3, 6\]"),
        (lambda: greedy([1] * 6, 0), r"6 experts on 0 ranks"),
        (lambda: greedy([1, -1], 2), r"at least 0 and not all 0"),
        (lambda: Placement((0, 0, 0, 1), 2), r"0\.\.1 must hold 2 experts"),
        (lambda: Placement((0, 2), 2), r"0\.\.1 must hold 1 experts"),
        (lambda: rank_violation([1, 1], Placement((0, 1, 2), 3)), "make the placement for this"),
        (lambda: rank_violation([0, 0], Placement((0, 1), 2)), "sums to 0"),
        (lambda: rank_violation([1, float("nan")], Placement((0, 1), 2)), "sums to nan"),
        (lambda: rank_violation([1, float("inf")], Placement((0, 1), 2)), "sums to inf"),
        (lambda: imbalance_cost([], 2, expert_share=0.5), "at least one layer"),
        (lambda: imbalance_cost([[1, 1]], 2, expert_share=50), r"must lie in \[0, 1\]"),
    ],
)
def test_what_makes_no_sense_is_refused_with_advice(call, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        call()


def test_doctests() -> None:
    for module in (moebalance.metrics.expert_parallel, moebalance.report.cost):
        found = doctest.testmod(module)
        assert found.failed == 0
        assert found.attempted > 0


def test_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "imbalance_cost.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "imbalance_cost.md", "exec"), names)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["1", "2", "4", "8"]
    assert "rank_violation=0.0, step_factor=1.0, wasted_share=0.0" in rows[0]


# The report


def table(runs, **options):
    (section,) = summarise(runs)
    return cost_table(section.methods, **options)


def test_the_table_has_a_line_a_method_and_the_mean_over_its_seeds(tmp_path: Path) -> None:
    uneven = [[6, 2, 0, 0], [2, 2, 2, 2]]
    even = [[2, 2, 2, 2]] * 2
    for method, seed, load in [("phi", 0, even), ("none", 0, uneven), ("none", 1, even)]:
        path = tmp_path / f"{method}-{seed}"
        write_run(path, method, seed=seed, steps=2, load=load)
    found = table(find_runs(tmp_path), expert_share=0.4)
    assert found.ep_sizes == (2, 4)
    phi, none = found.lines
    assert (phi.method.method, none.method.method) == ("phi", "none")
    assert {(cell.rank_violation.mean, cell.rank_violation.n) for cell in phi.cells} == {(0, 1)}
    two, four = none.cells
    # Seed 0: 1 on two ranks for its first layer, 0 for its second; seed 1: 0 and 0.
    assert (two.rank_violation.mean, two.rank_violation.n) == (0.25, 2)
    assert two.placed.mean == pytest.approx(0.125)  # {6, 0} and {2, 0}
    assert two.wasted_share.mean == pytest.approx((1 - 1 / 1.2) / 2)
    assert four.rank_violation.mean == four.placed.mean == 0.5
    assert "40%" in found.caption


def test_two_runs_of_one_seed_are_one_sample(tmp_path: Path) -> None:
    for number, load in enumerate(([[4, 0]], [[2, 2]])):
        write_run(tmp_path / str(number), "phi", seed=5, steps=2, load=load)
    ((cell,),) = (line.cells for line in table(find_runs(tmp_path)).lines)
    assert (cell.rank_violation.mean, cell.rank_violation.n) == (0.5, 1)


def test_runs_without_a_load_have_no_cost(tmp_path: Path) -> None:
    assert table(made(phi={"loss": [1.0], "maxvio": [0.5]})) is None
    write_run(tmp_path / "good", "phi", steps=2)
    write_run(tmp_path / "broken", "none", steps=2, load=[[0.5, None], [0.5, 0.5]])
    write_run(tmp_path / "empty", "switch", steps=2, load=[[0.0, 0.0]])
    found = table(find_runs(tmp_path))
    assert found.ep_sizes == (4, 8, 16, 32)
    cells = {line.method.method: line.cells for line in found.lines}
    assert cells["none"] == cells["switch"] == (None,) * 4
    assert all(cells["phi"])


def test_models_that_share_no_number_of_ranks_have_no_table(tmp_path: Path) -> None:
    write_run(tmp_path / "four", "phi", steps=2, experts=4)
    write_run(tmp_path / "three", "none", steps=2, load=[[1, 1, 1]])
    assert table(find_runs(tmp_path)) is None


def test_every_method_of_a_section_is_in_the_table(tmp_path: Path) -> None:
    runs = find_runs(write_runs(tmp_path, seeds=(0, 1), steps=20))
    for section in summarise(runs):
        found = cost_table(section.methods)
        assert [line.method for line in found.lines] == list(section.methods)
        for line in found.lines:
            violations = [cell.rank_violation.mean for cell in line.cells]
            assert violations == sorted(violations)
            assert all(cell.placed.mean <= cell.rank_violation.mean for cell in line.cells)


def test_the_page_shows_what_the_imbalance_would_cost(tmp_path: Path) -> None:
    from moebalance.report import write_report
    from moebalance.runlog import find_runs

    logs = Path(__file__).parents[1] / "evidence" / "results" / "demo"
    page = write_report(find_runs(logs), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What the imbalance would cost" in page
    assert all(f"{size} ranks" in page for size in (4, 8, 16, 32))
