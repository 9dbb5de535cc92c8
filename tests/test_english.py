"""Some constructions stay out of README, docs/ and public docstrings; see CONTRIBUTING.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from documents import ROOT, name_of
from english import AVOIDED, count, modules, occurrences, pages, prose


@pytest.mark.parametrize("file", [*pages(ROOT), *modules(ROOT)], ids=name_of)
def test_a_page_and_a_docstring_are_in_plain_english(file: Path) -> None:
    assert [found for name in AVOIDED for found in occurrences(prose(file), name)] == []


def test_code_and_private_docstrings_are_not_counted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("You shall `shall`,\n```\nshall\n```\n$shall$ and [it](shall.md).\n")
    module = tmp_path / "module.py"
    module.write_text(
        '"""Such as you."""\ndef _f():\n    """Shall."""\ndef g():\n    """Those\nthat."""\n'
    )
    words, found = count(prose(file) for file in (page, module))
    assert (words, found["shall"], found["you(r)"]) == (9, 1, 2)
    assert occurrences(prose(module), "those that / that of") == ["Such as you. Those that."]
