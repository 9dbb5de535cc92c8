"""The layout law: how a step's tokens are split among micro-batches and ranks changes no state.

Nor does it change what a method adds to the router's gradient, unless the method says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from torch.nn.parallel import DistributedDataParallel

from cases import METHODS, POTENTIALS, parts
from layout_cases import (
    ALONE,
    DENSE_ALONE,
    DENSE_PAIRS,
    NAMED_ALONE,
    NAMED_PAIRS,
    ONE,
    PAIRS,
    QUADS,
    RAGGED_ALONE,
    RAGGED_PAIRS,
    Layout,
    halves,
)
from layouts import (
    ROWS,
    SAME_GRADIENT,
    SAME_STATE,
    Difference,
    additive,
    difference,
    train_all,
)
from moebalance import LossFree, Sinkhorn, Together
from processes import run

ADDITIVE = [name for name, method in METHODS.items() if additive(method)]
COUPLED = {
    unit: [name for name, method in METHODS.items() if method.traits.coupling == unit]
    for unit in ("sequence", "batch", "step")
}
"""What must not be taken apart, and for whom."""
FEW = (
    "phi-negative-entropy",
    "phi-no-peek",
    "phi-hard",
    *COUPLED["sequence"],
    "ema-switch",
    "loss-free",
    "quantile",
    "z-loss",
    "phi-and-loss-free",
)
"""One of each kind, where time is short."""

UNSHARED = {"not summed": Layout(halves(0), wrap=DistributedDataParallel, alone=True)}
MOVED = ("phi-no-peek", "loss-free-fast", "quantile")
"""A mistake: ranks with different tokens that do not tell each other; and whom it moves most."""


def pair() -> dict:
    """What one rank of two saw."""
    trained = train_all(PAIRS, METHODS) | train_all(RAGGED_PAIRS, FEW)
    return trained | train_all(UNSHARED, MOVED)


@pytest.fixture(scope="module")
def one():
    return train_all({"all": ONE["all"]}, METHODS) | train_all(ONE, FEW)


@pytest.fixture(scope="module")
def two():
    return run(pair, 2, limit_s=240)


def compare(sides, one, name: str, layout: Layout, method: str) -> Difference:
    reference = one[layout.tokens, method]
    return difference([side[name, method] for side in sides], reference, METHODS[method])


def test_the_page_has_a_row_for_every_method():
    """`python tests/layouts.py` prints them; of the potentials, which are alike here, one."""
    page = (Path(__file__).parents[1] / "docs" / "layout.md").read_text(encoding="utf-8")
    table = page[page.index("| method | coupling |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["method", "coupling", *ALONE, *PAIRS, *QUADS, "state"]
    couplings = {row[0]: row[1] for row in cells[2:]}
    assert couplings == {name: METHODS[name].traits.coupling for name in ROWS}
    assert len({*METHODS} - {*ROWS}) < len(POTENTIALS)
    for method, coupling, *found, state in cells[2:]:
        assert float(state) <= SAME_STATE, method
        assert coupling != "token" or set(found) == {"="}, method


# --- the law ----------------------------------------------------------------------------------


def check(sides, one, name: str, layout: Layout, methods: Iterable[str]) -> None:
    """Hold every method's outcome under a layout against that of one process."""
    for method in methods:
        found = compare(sides, one, name, layout, method)
        said = f"{method} under {name}: {found}"
        assert found.state <= SAME_STATE, said
        if not any(isinstance(part, Sinkhorn) for part in parts(METHODS[method])):
            assert found.sums <= SAME_STATE, said
        if method in ADDITIVE:
            assert found.gradient <= SAME_GRADIENT, said
            assert found.effective <= SAME_GRADIENT, said


@pytest.mark.parametrize("name", [*ALONE, *RAGGED_ALONE])
def test_micro_batches_make_the_step_that_one_batch_makes(name, one):
    layout, methods = {**ALONE, **RAGGED_ALONE}[name], METHODS if name in ALONE else FEW
    check([train_all({name: layout}, methods)], one, name, layout, methods)


@pytest.mark.parametrize("name", [*PAIRS, *RAGGED_PAIRS])
def test_two_ranks_make_the_step_that_one_process_makes(name, one, two):
    methods = METHODS if name in PAIRS else FEW
    check(two, one, name, {**PAIRS, **RAGGED_PAIRS}[name], methods)


def test_four_ranks_make_the_step_that_one_process_makes(one):
    sides = run(train_all, 4, QUADS, FEW)
    for name, layout in QUADS.items():
        check(sides, one, name, layout, FEW)


NAMED = ("phi-negative-entropy", "phi-hard", "sequence", "loss-free", "z-loss", "phi-and-loss-free")


@pytest.mark.parametrize("name", NAMED_ALONE)
def test_named_linear_gates_make_the_step_of_balanced_routers(name, one):
    layout = NAMED_ALONE[name]
    check([renamed(train_all({name: layout}, NAMED))], one, name, layout, NAMED)


@pytest.fixture(scope="module")
def named():
    return run(train_all, 2, NAMED_PAIRS | DENSE_PAIRS, NAMED)


@pytest.mark.parametrize("name", NAMED_PAIRS)
def test_named_linear_gates_on_two_ranks_make_the_step_of_one_process(name, one, named):
    check([renamed(side) for side in named], one, name, NAMED_PAIRS[name], NAMED)


@pytest.mark.parametrize("name", DENSE_PAIRS)
def test_a_pipeline_with_a_dense_first_stage_makes_the_step_of_one_process(name, named):
    alone = train_all({"all": DENSE_ALONE["dense first"]}, NAMED)
    check(named, alone, name, DENSE_PAIRS[name], NAMED)
    assert all(not named[0][name, method] and named[1][name, method] for method in NAMED)


def renamed(side: dict) -> dict:
    """Layers by the name that they have where the gate is a router of ours."""
    return {
        key: {name.replace(".gate", ".router"): seen for name, seen in layers.items()}
        for key, layers in side.items()
    }


def test_ranks_that_do_not_share_what_they_counted_are_found_out(one, two):
    """Otherwise the tests above could not fail."""
    ((name, layout),) = UNSHARED.items()
    for method in MOVED:
        found = compare(two, one, name, layout, method)
        assert found.state > 1e-4, method
        assert found.sums > 0.1, method
        assert found.gradient > 1e-4, method


# --- who cannot obey --------------------------------------------------------------------------


@pytest.mark.parametrize("method", COUPLED["batch"] + COUPLED["step"])
def test_a_method_that_says_its_gradient_depends_on_the_layout_tells_the_truth(method, one, two):
    found = {n: compare(two, one, n, layout, method).effective for n, layout in PAIRS.items()}
    # Under tensor parallelism every rank has all tokens in one batch: nothing is split.
    assert found.pop("TP 2") <= SAME_GRADIENT
    assert min(found.values()) > 1e-3, found


@pytest.mark.parametrize("method", [name for names in COUPLED.values() for name in names])
def test_a_batch_of_another_rank_weighs_as_one_of_another_micro_batch(method, two):
    """But not to a method that looks back at the earlier micro-batches of its own process."""
    apart = train_all({"DDP 2": ALONE["accumulation 2"]}, [method])
    sides = [rank["DDP 2", method] for rank in two]
    found = difference(sides, apart["DDP 2", method], METHODS[method])
    if method in COUPLED["step"]:
        assert found.gradient > 1e-3
    else:
        assert found.gradient <= SAME_GRADIENT


@pytest.mark.parametrize("name", COUPLED["sequence"])
def test_a_loss_of_whole_sequences_depends_on_where_sequences_are_cut_and_on_their_lengths(
    name, one, two
):
    for layout_name, layout in PAIRS.items():
        found = compare(two, one, layout_name, layout, name).effective
        assert found > 0.1 if layout.cuts_sequences else found <= SAME_GRADIENT, layout_name
    padded = "DDP 2, padding"
    assert compare(two, one, padded, RAGGED_PAIRS[padded], name).effective > 0.01


def test_two_methods_together_couple_as_much_as_the_one_that_couples_more():
    by_unit = {"token": LossFree(), **{unit: METHODS[COUPLED[unit][0]] for unit in COUPLED}}
    for number, (unit, method) in enumerate(by_unit.items()):
        for other, free in list(by_unit.items())[: number + 1]:
            if not (method.traits.selects and free.traits.selects):
                assert Together(method, free).traits.coupling == unit, other
                assert Together(free, method).traits.coupling == unit, other
