"""Every promise of `attach` on every MoE family of the installed Transformers, row by row."""

import logging

import pytest
import transformers

from families import COMMON, FAMILIES
from family_checks import examine
from family_page import PAGE, committed_counts, committed_rows, page


@pytest.mark.filterwarnings("ignore")  # the families' own, of every kind
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_keeps_every_promise_its_row_in_the_docs_makes(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    committed = committed_rows()[family]
    row = examine(family, whole=family in COMMON)
    if family not in COMMON:  # only its MoE blocks were compiled, which may have fewer graph breaks
        row = row._replace(compile=committed.compile)
    assert row == committed


@pytest.mark.skipif(
    f"# Families of Transformers {transformers.__version__}\n" not in PAGE.read_text("utf-8"),
    reason="the page is of another release",
)
def test_the_page_around_the_rows_is_what_was_counted() -> None:
    releases = [count.transformers for count in committed_counts()]
    assert releases == ["5.24.0", "5.16.1", "5.6.0", "5.0.0"]
    assert PAGE.read_text(encoding="utf-8") == page(committed_rows())
