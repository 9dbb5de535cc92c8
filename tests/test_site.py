"""What the site adds to Sphinx. `make docs` builds it all, with warnings as errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from xml.etree import ElementTree

import pytest
import torch

import moebalance as mb
from documents import DOCS, PAGES, ROOT, headings, name_of, prose
from moebalance.words.methods import method_classes

sys.path.insert(0, str(ROOT / "docs"))
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import generate
import rooms
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


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_every_page_of_docs_is_in_the_index(page: Path) -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
    assert name == "index" or f"\n{name}\n" in index


def test_no_formula_has_a_bar_that_would_end_its_cell() -> None:
    rows = [row for page in PAGES for row in prose(page).splitlines() if row.startswith("|")]
    formulas = [row for row in rows if "$" in row]
    assert formulas
    assert all(cell.count("$") % 2 == 0 for row in formulas for cell in row.split("|"))


def test_the_picture_of_the_rooms_is_that_of_the_imports() -> None:
    assert (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8") == generate.picture()


def test_the_table_of_methods_is_that_of_the_classes() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8") == generate.readme()


def test_the_walk_names_every_room_and_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## The rooms\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))
    found = rooms.read_imports(ROOT / "src" / "moebalance")
    assert named == {room.partition(".")[0] for room in found}


def walk() -> tuple[list[str], set[str]]:
    """Files of the walk, in the order of their numbers, and the helpers that they call."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    path = re.findall(r"^\| (\d+) \| `([\w/<>]+\.py)` \|", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in path] == list(range(1, 13))  # 9, and 3 where attached
    helpers = page.partition("| helper |")[2].partition("\n\n")[0]
    return [file for _, file in path], set(re.findall(r"`([\w/]+\.py)`", helpers))


def test_the_walk_names_files_that_there_are() -> None:
    path, helpers = walk()
    files = {file.replace("<one>", "phi") for file in path} | helpers
    assert [file for file in files if not (ROOT / "src" / "moebalance" / file).exists()] == []


@pytest.mark.parametrize("method", [mb.PhiBalancing(), mb.SwitchLoss(), mb.LossFree()], ids=repr)
def test_a_batch_enters_no_file_that_the_walk_leaves_out(method: mb.Method) -> None:
    router = mb.BalancedRouter(method, num_experts=8, top_k=2)
    balancing, entered = mb.attach(router), set()

    def one_step() -> None:
        router(torch.randn(16, 8, requires_grad=True))[0].square().sum().backward()
        balancing.step()
        balancing.metrics()

    def trace(frame: FrameType, *_: object) -> None:
        entered.add(frame.f_code.co_filename)

    one_step()  # what is imported on first use is no part of the path
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        one_step()
    finally:
        sys.settrace(before)
    library = ROOT / "src" / "moebalance"
    files = {Path(f).relative_to(library).as_posix() for f in entered if f.startswith(str(library))}
    path, helpers = walk()
    own = Path(sys.modules[type(method).__module__].__file__).name
    assert files - helpers - {file.replace("<one>.py", own) for file in path[:9]} == set()
    assert len(files) > 9  # the trace saw something


@pytest.mark.parametrize("circle", ["c", "b"])
def test_rooms_stand_above_what_they_import_and_a_circle_is_refused(circle: str) -> None:
    below = {"a": {"b", "c"}, "b": {"c"}, "c": set[str]()}
    imports = {room: frozenset(others) for room, others in below.items()}
    assert rooms.floors(imports) == [["c"], ["b"], ["a"]]
    assert list(rooms.direct(imports)) == [("a", "b"), ("b", "c")]
    with pytest.raises(ValueError, match="circle"):
        rooms.floors({**imports, circle: frozenset({"a"})})


def test_imports_are_read_wherever_they_stand(tmp_path: Path) -> None:
    files = {
        "__init__.py": "import moebalance.a",
        "a.py": "def f():\n    from moebalance.b.deep import x\nimport torch",
        "b/deep.py": "import moebalance.c, moebalance.b.other",
        "b/other.py": "from moebalance import c as renamed",
        "c.py": "from moebalance.integrations.one.two import y",
        "integrations/__init__.py": "",
        "integrations/one/two.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert rooms.read_imports(tmp_path) == {
        "a": {"b"},
        "b": {"c"},
        "c": {"integrations.one"},
        "integrations.one": frozenset(),
    }


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\.\. auto\w+:: moebalance\.(?:\w+\.)*(\w+)$", page, re.MULTILINE))
    shown |= {kind.__name__ for kind in method_classes().values()}  # by `.. methods::`
    for module in (mb, mb.methods, mb.potentials, mb.huggingface):
        assert {*module.__all__} - shown <= {"__version__"}


WORDS = {
    "load",
    "price",
    "strength",
    "charge",
    "selection-bias",
    "step",
    "micro-batch",
    "coupling",
    "proportions",
    "averaging-rate",
    "speed",
    "gain",
    "potential",
    "dead-expert",
    "maxvio",
    "soft-load",
    "hard-load",
}


def test_the_glossary_has_the_words_and_their_examples() -> None:
    glossary = ROOT / "docs" / "glossary.md"
    assert headings(glossary) >= WORDS
    entries = glossary.read_text(encoding="utf-8").split("\n## ")[1:]
    without = [e.partition("\n")[0] for e in entries if not re.search(r"\d", e.partition("\n")[2])]
    assert without == []
