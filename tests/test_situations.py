"""The page of situations is the one that the tests' markers make."""

from __future__ import annotations

from situations import PAGE, page, situations


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/situations.py"


def test_every_situation_works_or_is_refused_with_a_reason() -> None:
    rows = situations()
    assert len({row.what for row in rows}) == len(rows) > 20
    for row in rows:
        assert row.outcome.startswith(("works", "refused: ", "warned: ")), row
