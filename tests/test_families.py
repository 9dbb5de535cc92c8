"""Every promise of `attach` on every MoE family of the installed Transformers, row by row."""

import logging

import pytest

from families import FAMILIES
from family_checks import committed_rows, examine

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the families' own, of every kind
    pytest.mark.parametrize("family", FAMILIES),
]


def test_a_family_keeps_every_promise_its_row_in_the_docs_makes(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    assert str(examine(family)) == committed_rows()[family]
