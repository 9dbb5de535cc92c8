"""Names from strangers, in each place that they are written to: they are seen and do nothing."""

from __future__ import annotations

import ast
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from rich.text import Text
from safetensors.torch import save_file

from checkpoints import saved
from moebalance.cleaning import for_markdown, for_page, for_path, for_terminal
from moebalance.lab import console as printing
from moebalance.lab.bench.page import draw, table
from moebalance.lab.console import Terminal
from moebalance.lab.progress import Bars, follow_log
from moebalance.lab.recipe import Recipe
from moebalance.lab.workers import Job
from moebalance.metrics.shown import markdown
from moebalance.report import write_figure, write_figures, write_report
from moebalance.report.markdown import write_markdown
from moebalance.runlog import LOG_NAME, Run, RunLog, archive, find_runs
from payloads import ESCAPES, MARKUP, NAMES, PATHS
from synthetic_runs import write_run

ACTING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
OWN = re.compile(r"\r?\x1b\[[0-9;?]*[A-Za-z]")
"""What rich itself writes: colours, and the cursor of bars."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Logs in which every entry that is a name is hostile, six names a run."""
    folder = tmp_path_factory.mktemp("hostile")
    for i in range(0, len(NAMES), 6):
        some = (NAMES[i : i + 6] * 6)[:6]
        log = write_run(folder / str(i), "phi", steps=4, experts=4) / LOG_NAME
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        header = rows[0]
        header |= {"method": some[0], "method_repr": some[1], "name": some[2]}
        header["model"] |= {"architecture": some[3], "layers": [some[4], some[5]]}
        header["data"]["domains"] = (some * 2)[: len(header["data"].get("domains") or some)]
        header["recipe"] = {some[4]: some[5], "train": some[0]}
        header["parts"] = [{"kind": some[1], "settings": {some[2]: some[3]}, "inner": []}]
        rows[-1] |= {"status": some[0], "error": some[1]}
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return find_runs(folder)


# --- The terminal ---------------------------------------------------------------------------------


def terminal(width: int = 100) -> Terminal:
    return Terminal(file=io.StringIO(), force_terminal=True, width=width, color_system="standard")


def printed(where: Terminal) -> str:
    """What a terminal was sent, without what rich itself writes."""
    return OWN.sub("", where.file.getvalue())


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_in_a_terminal_is_seen_and_does_nothing(name: str) -> None:
    assert not ACTING.search(for_terminal(name))
    where = terminal(9999)
    where.print(name, highlight=False)
    where.print(Text(name))
    assert not ACTING.search(printed(where))
    if name in MARKUP:
        assert printed(where) == f"{name}\n{name}\n"


@pytest.mark.survives(
    "Names of strangers",
    "Escape sequences and markup in names, in a terminal",
    "goes on: they are seen and do nothing",
)
def test_reports_and_watching_print_hostile_names_and_nothing_acts(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = terminal()
    monkeypatch.setattr(printing, "console", where)
    printing.show(runs[:3], tmp_path / "report.html")
    printing.watch_runs([run.path for run in runs], once=True)
    for run in runs:
        printing.watch_runs([run.path], once=True)
        printing.show_diagnosis(str(run.path))
    assert not ACTING.search(printed(where))
    assert "[red]x[/nothing]" in printed(where)


def test_the_doctor_of_a_model_prints_hostile_names_and_nothing_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "olmoe")
    described = {"format": 3, "method": "LossFree", "steps": 1}
    for name in ESCAPES[:-2]:  # what a file of safetensors can hold
        metadata = json.dumps({**described, "method_repr": name})
        file = folder / "moebalance.safetensors"
        save_file({f"{name}/x": torch.zeros(1)}, file, metadata={"moebalance": metadata})
        where = terminal()
        monkeypatch.setattr(printing, "console", where)
        printing.show_diagnosis(str(folder))
        assert not ACTING.search(printed(where))
        assert "Balanced by" in printed(where)


def test_bars_and_lines_print_hostile_names_and_nothing_acts(tmp_path: Path) -> None:
    where = terminal()
    with (bars := Bars(where, len(NAMES), 4)).bars:
        for name in NAMES:
            bars.tell({Job(name, 0, "mixed", tmp_path): 1}, {})
    for name in NAMES[:2]:
        with follow_log(where, tmp_path / LOG_NAME, 4, name):
            pass
    assert not ACTING.search(printed(where))


def test_nothing_is_printed_but_through_the_cleaned_console() -> None:
    for path in Path("src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                where = f"{path}:{node.lineno}"
                assert called not in ("print", "Console", "typer.echo", "Text.from_markup"), where
                assert not called.startswith(("sys.stdout.", "sys.stderr.")), where


# --- Markdown -------------------------------------------------------------------------------------


class Read(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


def rendered(text: str) -> Read:
    return Read(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


def plain(name: str) -> str:
    return " ".join(for_terminal(name).split())


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_in_markdown_stands_for_itself(name: str) -> None:
    clean = for_markdown(name)
    assert "\n" not in clean
    paragraph = rendered(f"{clean}\n")
    assert paragraph.tags <= {"p"}
    assert paragraph.words.strip() == plain(name)
    page = rendered(f"| a | b |\n|---|---|\n| {clean} | 1 |\n")
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"}
    assert (
        page.words.split("\n\n")[-1].split() == [*plain(name).split(), "1"]
        or plain(name) in page.words
    )
    title = rendered(f"## {clean} of it\n")
    assert title.tags == {"h2"}


@pytest.mark.survives(
    "Names of strangers",
    "HTML, links and pipes in names, in Markdown",
    "goes on: as plain text",
)
def test_a_markdown_report_of_hostile_names_holds_titles_tables_and_text_alone(
    runs: list[Run], tmp_path: Path
) -> None:
    text = write_markdown(runs, tmp_path / "report.md", " ".join(NAMES)).read_text("utf-8")
    page = rendered(text)
    assert page.tags <= {"h1", "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert not ACTING.search(text)
    for some in (MARKUP, PATHS):
        found = rendered(markdown([[name, 1, 2] for name in some]))
        assert found.tags <= {"table", "thead", "tbody", "tr", "th", "td"}


# --- SVG and HTML ---------------------------------------------------------------------------------


def well_formed(text: str) -> ET.Element:
    assert not ACTING.search(text)
    root = ET.fromstring(text)
    for node in root.iter():
        assert node.tag.rpartition("}")[2] not in ("script", "img", "foreignObject")
        assert not any(key.lower().startswith("on") for key in node.attrib)
    return root


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_leaves_a_page_without_characters_that_xml_forbids(name: str) -> None:
    assert not ACTING.search(for_page(name))
    for_page(name).encode("utf-8")


@pytest.mark.survives(
    "Names of strangers",
    "Control characters and scripts in names, in SVG",
    "goes on: the files are well formed",
)
def test_figures_of_hostile_names_are_well_formed_and_run_nothing(
    runs: list[Run], tmp_path: Path
) -> None:
    for i in range(0, len(runs), 5):
        some = runs[i : i + 5]
        for path in write_figures(some, tmp_path / str(i), ["svg"]):
            well_formed(path.read_text("utf-8"))
        well_formed(write_figure(some, tmp_path / "one.svg").read_text("utf-8"))


def test_the_page_of_hostile_names_has_well_formed_pictures_and_no_tag_of_theirs(
    runs: list[Run], tmp_path: Path
) -> None:
    page = write_report(runs, tmp_path / "report.html").read_text("utf-8")
    assert not ACTING.search(page)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) > 5
    for picture in pictures:
        well_formed(picture)
    for tag in ("<script>alert", "<img", "<svg/onload"):
        assert tag not in page


def test_a_benchmark_of_hostile_names_is_plain() -> None:
    numbers = {"ratio": 1.0, "low": 0.9, "high": 1.1, "time_ms": 1.0, "bytes": 1.0, "kept": 1.0}
    variants = {name: {**numbers, "kernels": (1, 2)} for name in NAMES}
    cases = [{"case": name, "variants": variants} for name in NAMES[:3]]
    well_formed(for_page(draw({"routers": cases})))
    for case in cases:
        assert rendered(table(case)).tags <= {"h2", "table", "thead", "tbody", "tr", "th", "td"}


# --- Paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_in_a_path_is_one_folder_and_never_another(name: str, tmp_path: Path) -> None:
    clean = for_path(name)
    assert Path(clean).name == clean != ""
    assert clean not in (".", "..")
    assert len(clean.encode()) < 120
    (tmp_path / clean).mkdir()
    assert (tmp_path / clean).resolve().parent == tmp_path.resolve()


def test_different_names_keep_different_paths() -> None:
    assert len({for_path(name) for name in NAMES}) == len(NAMES)
    assert for_path("mixed") == "mixed"


@pytest.mark.survives(
    "Names of strangers",
    "`../../x` as a name, in a path",
    "goes on: in the folder that you named",
)
def test_an_archive_of_hostile_names_stays_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    for i, name in enumerate(NAMES):
        log = write_run(folder / str(i), "phi", steps=2, experts=4) / LOG_NAME
        first, rest = log.read_text().split("\n", 1)
        log.write_text(json.dumps({**json.loads(first), "batching": name}) + "\n" + rest)
    found = find_runs(folder)
    to = tmp_path / "a" / "b" / "archive"
    printing.save_extras(found, figure=None, figures=None, to=tmp_path, markdown=None, archive=to)
    assert len(list(to.rglob(LOG_NAME))) == len(NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "runs"]


@pytest.mark.parametrize("name", PATHS, ids=range(len(PATHS)))
def test_a_recipes_name_cannot_lead_its_runs_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moebalance.lab import jobs

    recipe = Recipe.parse({"name": name, "model": {"architecture": "olmoe"}}, source="x.toml")
    seen: list[Path] = []
    monkeypatch.setattr(jobs, "plan", lambda recipe, folder: seen.append(folder) or [])
    monkeypatch.setattr(jobs, "compare", lambda *_, **__: [])
    monkeypatch.setattr(jobs, "show", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    jobs.compare_all(recipe, None)
    assert seen[0].parent == Path("runs")
    assert seen[0].resolve().parent == tmp_path.resolve() / "runs"


def test_a_log_of_a_name_that_no_file_can_hold_is_written_and_read(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        log.write("header", method="phi", name="half \ud800 a character")
    (run,) = find_runs(tmp_path)
    assert run.header["name"] == "half ? a character"
    archive(run, tmp_path / "a")


def test_a_log_of_another_writer_with_half_a_character_is_reported_diagnosed_and_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_run(tmp_path / "half", "phi") / LOG_NAME
    text = log.read_text().replace('"phi"', '"\\udfff x \\ud83d\\ude00"')
    log.write_text(text.replace('"step_time_s"', '"\\uDC00"'))
    where = terminal()
    monkeypatch.setattr(printing, "console", where)
    printing.show(find_runs(tmp_path), tmp_path / "report.html")
    printing.watch_runs([tmp_path], once=True)
    printing.show_diagnosis(str(tmp_path))
    assert "? x 😀" in printed(where)  # two halves are a whole


def test_every_payload_is_of_a_kind_that_acts_or_leads_somewhere() -> None:
    assert all(ACTING.search(name) or "\n" in name or "\t" in name for name in ESCAPES)
