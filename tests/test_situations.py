"""The pages of situations and faults are made from the tests' markers."""

from __future__ import annotations

import pytest

from situations import SITUATIONS, SURVIVES

each_page = pytest.mark.parametrize("page", [SITUATIONS, SURVIVES], ids=lambda page: page.mark)


@each_page
def test_the_page_is_up_to_date(page) -> None:
    assert page.path.read_text(encoding="utf-8") == page.text(), "run python tests/situations.py"


@each_page
def test_every_row_has_an_outcome_with_a_reason(page) -> None:
    rows = page.rows()
    assert len({row.what for row in rows}) == len(rows) > 20
    for row in rows:
        assert row.outcome.startswith(page.outcomes), row
