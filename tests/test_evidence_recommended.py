"""The rule for the recommended method, on planted studies."""

from __future__ import annotations

import pytest

from evidence.chapter import Verdict
from evidence.chapters.recommended import CELLS, NOISE, REPORT, TESTS, Score, chapter, recommend
from synthetic_studies import study

SETTINGS = ("none", "switch", "phi", "phi+loss-free")


def planted(maxvio: dict[str, float], *, dead: float = 0.0, cheap: float = 0.0):
    """Cells in which φ + loss-free has these MaxVio, and Switch a loss lower by `cheap`.

    A cell that tests has a MaxVio of 0.2 if none is given.
    """
    maxvio = dict.fromkeys(TESTS, 0.2) | maxvio

    def plant(cell: str):
        def numbers(setting: str, seed: int, batching: str):
            ours = setting == "phi+loss-free" and cell in maxvio
            return {
                "loss": 2.0 - cheap * (setting == "switch"),
                "maxvio": maxvio[cell] if ours else 1.0,
                "soft_maxvio": 0.3,
                "dead_experts": dead if ours else 0.0,
                "mi": 0.2,
            }

        return numbers

    return {cell: study(cell, SETTINGS, plant(cell), seeds=2) for cell in (*CELLS, *TESTS, REPORT)}


@pytest.mark.parametrize(
    ("maxvio", "dead", "verdict"),
    [
        ((0.1, 0.2, 0.25), 0.0, Verdict.HOLDS),
        ((0.1, 0.2, 0.4), 0.0, Verdict.IN_PART),
        ((0.3, 0.3, 0.4), 0.0, Verdict.IN_PART),
        ((0.1, 0.1, 0.1), 0.5, Verdict.NOT_HERE),
        ((0.1, 0.2, 0.25, 0.3), 0.0, Verdict.IN_PART),
        ((0.3, 0.3, 0.4, 0.3, 0.3, 0.3, 0.3), 0.0, Verdict.NOT_HERE),
    ],
)
def test_the_goal_is_held_in_every_cell_that_chooses_or_tests(maxvio, dead, verdict):
    found = chapter(planted(dict(zip((*CELLS, *TESTS), maxvio, strict=False)), dead=dead))
    assert found.verdict is verdict
    assert "The rule takes `phi+loss-free`." in found.because


def test_a_lower_loss_beyond_noise_wins_over_balance():
    cells = dict.fromkeys(CELLS, 0.1)
    assert "takes `phi+loss-free`" in chapter(planted(cells, cheap=0.9 * NOISE)).because
    assert "takes `switch`" in chapter(planted(cells, cheap=1.1 * NOISE)).because


def test_a_cell_that_tests_chooses_nothing():
    cells = planted(dict.fromkeys(CELLS, 0.1) | dict.fromkeys(TESTS, 9.0))
    assert "takes `phi+loss-free`" in chapter(cells).because


def test_the_worst_cell_decides_among_equals():
    found = {"even here, not there": Score(0.0, 0.9), "even enough": Score(0.01, 0.3)}
    assert recommend(found) == "even enough"
