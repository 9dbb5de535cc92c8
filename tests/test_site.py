"""What the site adds to Sphinx. `make docs` builds it all, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from documents import PAGES, ROOT, name_of, prose

sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from docstrings import to_restructured
from mathml import to_mathml
from offline import faults


def test_a_function_stands_apart_from_its_operands_and_not_from_a_bracket() -> None:
    found = to_mathml(r"r \log x + \log(y)", "inline")
    names = [node.tag.rpartition("}")[2] for node in ElementTree.fromstring(found).iter()]
    assert " ".join(names) == "math mrow mi mspace mi mspace mi mo mi mo mi mo"


def test_absolute_values_plurals_and_formulas_become_restructured_text() -> None:
    lines = [
        "Of `Gate`s, |x| is",
        "",
        "    a = |b|",
        "    c",
        "",
        "and",
        "",
        "Args:",
        "    n: |y|.",
    ]
    assert to_restructured(lines) == [
        "Of `Gate`\\ s, \\|x\\| is",
        "",
        "::",
        "",
        "    a = |b|",
        "    c",
        "",
        "and",
        "",
        "Args:",
        "    n: \\|y\\|.",
    ]


def test_examples_in_docstrings_are_left_as_they_are() -> None:
    lines = ["Add.", "", ">>> a | b", "    3 | 4", "", "|z|"]
    assert to_restructured(lines) == [*lines[:-1], "\\|z\\|"]


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/x.js">',
        "<link rel=stylesheet href=//fonts.example/f.css>",
        "a { background: url('http://x.example/y.png') }",
        "built in /home/me/moebalance/docs",
    ],
)
def test_a_page_that_needs_the_network_or_tells_where_it_was_built_is_refused(page: str) -> None:
    assert len(list(faults(page, "/home/me/moebalance"))) == 1


def test_links_to_the_web_and_own_files_are_no_fault() -> None:
    page = '<a href="https://arxiv.org/abs/2605.15403">paper</a> <img src="cost.svg">'
    assert not list(faults(page, "/home/me/moebalance"))


@pytest.mark.parametrize("page", PAGES[1:], ids=name_of)
def test_every_page_of_docs_is_in_the_index(page: Path) -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
    assert name == "index" or f"\n{name}\n" in index


def test_no_formula_has_a_bar_that_would_end_its_cell() -> None:
    rows = [row for page in PAGES for row in prose(page).splitlines() if row.startswith("|")]
    formulas = [row for row in rows if "$" in row]
    assert formulas
    assert all(cell.count("$") % 2 == 0 for row in formulas for cell in row.split("|"))
