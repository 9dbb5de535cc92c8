"""Whatever has happened to a log, it gives a page or is refused in words: damage at random."""

from __future__ import annotations

import copy
import json
import random

import pytest

from fuzzing import FUZZ, LONGER
from moebalance.report import diagnosis, write_report
from moebalance.report.markdown import write_markdown
from moebalance.runlog import LOG_NAME, find_runs
from synthetic_runs import write_run

DAMAGE = (
    *(None, "x", "<hurt>", True, -1, 0, 10**30, 10**400, 1e308, -1e308, float("nan"), float("inf")),
    *([], {}, [None], [[]], [["x"]], {"a": 1}),
)
BATCHES = 2 * (LONGER if FUZZ else 1)
FIRST = random.randrange(10**6) if FUZZ else 0
"""Of twenty logs each: `make test` tries always the same, `make fuzz` others each time."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    log = write_run(tmp_path_factory.mktemp("whole"), "phi", steps=120, experts=8) / LOG_NAME
    return [json.loads(line) for line in log.read_text().splitlines()]


def places(value, above=()):
    """Every key and index in a row, with what is above it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inside:
        found.append((*above, key))
        if isinstance(part, dict | list):
            found += places(part, (*above, key))
    return found


def damaged(rows, dice):
    """The rows with one to four of them hurt; the first and the last ones more often."""
    rows = copy.deepcopy(rows)
    for _ in range(dice.randint(1, 4)):
        at = dice.choice([0, len(rows) - 1, len(rows) - 2, dice.randrange(len(rows))])
        what = dice.choice(["set", "set", "set", "forget", "lose", "repeat", "swap"])
        if what in ("set", "forget"):
            depth = dice.choice([1, 1, 2, 3, 9])
            *above, last = dice.choice([p for p in places(rows[at]) if len(p) <= depth])
            holder = rows[at]
            for key in above:
                holder = holder[key]
            if what == "set":
                holder[last] = dice.choice(DAMAGE)
            else:
                del holder[last]
        elif what == "lose":
            del rows[at]
        elif what == "repeat":
            rows.insert(at, copy.deepcopy(rows[at]))
        else:
            other = dice.randrange(len(rows))
            rows[at], rows[other] = rows[other], rows[at]
    return rows


@pytest.mark.survives(
    "Files and pages",
    "Logs with rows hurt, lost, repeated or swapped",
    "goes on: with a page; or it is refused by name",
)
@pytest.mark.parametrize("batch", range(FIRST, FIRST + BATCHES))
def test_a_damaged_log_gives_a_page_or_is_refused_in_words(rows, tmp_path, batch):
    write_run(tmp_path / "runs" / "beside", "switch", steps=120, experts=8)
    log = write_run(tmp_path / "runs" / "hurt", "phi", steps=120) / LOG_NAME
    shown = 0
    for seed in range(20 * batch, 20 * batch + 20):
        dice = random.Random(seed)
        text = "\n".join(json.dumps(row) for row in damaged(rows, dice)) + "\n"
        log.write_text(text[: dice.randrange(len(text))] if dice.random() < 0.1 else text)
        try:
            runs = find_runs(tmp_path / "runs")
        except ValueError as refused:
            assert str(log) in str(refused)  # noqa: PT017 both ways are right, in their own words
            continue
        page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
        assert page.rstrip().endswith("</html>")
        assert "<hurt>" not in page
        write_markdown(runs, tmp_path / "report.md", "Damaged")
        assert diagnosis.render(diagnosis.diagnose(runs))
        shown += 1
    assert shown >= 8
