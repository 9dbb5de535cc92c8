"""The page in a real browser: it loads without network or complaint, and everything on it works.

Needs a Chromium; without one these tests are skipped, and the end of the test run says so. With
`CHROMIUM` set to a program they fail instead where it does not start.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import DESKTOP, PHONE, Page, browser, executable
from moebalance.report import summarise, write_report
from moebalance.report.draw import DEAD_SHADE, SHADES, curve, shade
from moebalance.report.live import ReportServer
from moebalance.report.loads import relative
from moebalance.runlog import LOG_NAME, RunLog, find_runs, read_run
from synthetic_runs import write_run, write_runs

pytestmark = pytest.mark.skipif(
    executable() is None, reason="no Chromium on this machine: install one, or set CHROMIUM"
)
METHODS = ("phi", "switch", "none")
FIRST = "section.mode"


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    program = executable()
    assert program is not None
    with browser(program) as page:
        yield page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_runs(root, methods=METHODS, seeds=(0, 1))
    write_report(find_runs(root), root / "report.html")
    return root


def ready(tab: Page) -> None:
    """Wait until the maps are drawn."""
    tab.wait(
        "[...document.querySelectorAll('.explorer')].every(e => e.classList.contains('alive')"
        " || !e.querySelector('[data-pack]'))"
    )


def opened(tab: Page, file: Path, size: tuple[int, int] = DESKTOP, **look: bool) -> Page:
    tab.errors.clear()
    tab.requests.clear()
    tab.size(*size, **look)
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    tab.open(file.as_uri())
    ready(tab)
    return tab


@pytest.fixture
def page(tab: Page, folder: Path) -> Iterator[Page]:
    yield opened(tab, folder / "report.html")
    assert tab.errors == []


def texts(tab: Page, selector: str) -> list[str]:
    return tab.run(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent.trim())")


def tip(tab: Page) -> str | None:
    return tab.run("tip.hidden ? null : tip.innerText")


def test_the_page_asks_for_nothing_and_says_nothing(tab, folder):
    opened(tab, folder / "report.html")
    assert tab.requests == [(folder / "report.html").as_uri()]
    assert tab.errors == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_the_window_and_can_be_looked_at(tab, folder, tmp_path, size, dark):
    opened(tab, folder / "report.html", size, dark=dark, mobile=size == PHONE)
    assert tab.run("document.documentElement.scrollWidth") == size[0]
    paper = tab.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 23, 26)" if dark else "rgb(253, 253, 252)")
    picture = tab.shoot(tmp_path / "page.png")
    assert picture.stat().st_size > 100_000
    assert tab.errors == []


def test_a_phone_is_told_of_columns_to_the_right_until_it_has_scrolled(tab, folder):
    box = f"document.querySelector('{FIRST} .scroll')"
    cue = f"getComputedStyle({box}, '::before').content"
    opened(tab, folder / "report.html", PHONE, mobile=True)
    assert "More columns to the right" in tab.run(cue)
    tab.run(f"{box}.scrollTo(80, 0)")
    tab.wait(f"{cue} === 'none'")
    opened(tab, folder / "report.html", DESKTOP)
    assert tab.run(cue) == "none"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_mark_of_loss_against_maxvio_has_its_name_within_the_window(tab, folder, size):
    opened(tab, folder / "report.html", size, mobile=size == PHONE)
    plot = "narrow" if size == PHONE else "wide"
    places = tab.run(
        f"[...document.querySelectorAll('{FIRST}:first-of-type .{plot} svg text')].map(e => "
        " [e.textContent, e.getBoundingClientRect().left, e.getBoundingClientRect().right])"
    )
    shown = {text: (left, right) for text, left, right in places}
    for method in summarise(find_runs(folder))[0].methods:
        left, right = shown[method.label]
        assert 0 <= left < right <= size[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_dead_experts_have_the_colour_of_the_legend(tab, folder, dark):
    opened(tab, folder / "report.html", dark=dark)
    legend = tab.run("getComputedStyle(document.querySelector('.scale .dead')).backgroundColor")
    drawn = tab.run(
        """(() => {
          const canvas = document.querySelector('.explorer figure[data-method=none] canvas');
          const copy = Object.assign(document.createElement('canvas'),
            {width: canvas.width, height: canvas.height}).getContext('2d');
          copy.drawImage(canvas, 0, 0);
          const at = copy.getImageData(canvas.width - 6, canvas.height / 4, 1, 1).data;
          return `rgb(${at[0]}, ${at[1]}, ${at[2]})`;
        })()"""
    )
    assert drawn == legend  # the least loaded stands last


def test_columns_sort_by_mouse_and_by_key(page, folder):
    section = summarise(find_runs(folder))[0]
    by_violation = sorted(section.methods, key=lambda m: m.estimates["maxvio"].mean)
    names = f"{FIRST} table.methods tbody th"
    page.run("document.querySelectorAll('button.sort')[2].id = 'by-violation'")
    page.click("#by-violation")
    order = [text.split("2 seeds")[0] for text in texts(page, names)[:3]]
    assert order == [m.label for m in by_violation]
    head = "document.querySelector('#by-violation').closest('th').getAttribute('aria-sort')"
    assert page.run(head) == "ascending"
    page.run("document.querySelector('#by-violation').focus()")
    page.press("Enter")
    order = [text.split("2 seeds")[0] for text in texts(page, names)[:3]]
    assert order == [m.label for m in reversed(by_violation)]
    assert page.run(head) == "descending"


def test_a_method_can_be_hidden_everywhere(page):
    button = f"{FIRST} .legend [data-method=switch]"
    visible = (
        f"[...document.querySelectorAll('{FIRST}:first-of-type .series[data-method=switch]')]"
        ".map(e => e.style.display !== 'none')"
    )
    before = page.run(visible)
    assert len(before) >= 8
    assert all(before)
    page.click(button)
    assert not any(page.run(visible))
    assert page.run(f"document.querySelector('{button}').getAttribute('aria-pressed')") == "false"
    page.click(button)
    assert all(page.run(visible))


def cells(tab: Page, method: str) -> list[list[str]]:
    """The colour class of every cell of the first map of a method, read off its canvas."""
    return tab.run(
        """(() => {
          const canvas = document.querySelector('.explorer figure[data-method=METHOD] canvas');
          const copy = (width, height) => Object.assign(document.createElement('canvas'),
            {width, height}).getContext('2d', {willReadFrequently: true});
          const pen = copy(canvas.width, canvas.height);
          pen.drawImage(canvas, 0, 0);
          const box = canvas.getBoundingClientRect(), style = getComputedStyle(document.body);
          const names = [...Array(13).keys()].map(i => 'h' + i).concat('dead');
          const css = copy(1, 1);
          const known = new Map(names.map(n => {
            css.fillStyle = style.getPropertyValue('--' + n).trim();
            css.fillRect(0, 0, 1, 1);
            return [css.getImageData(0, 0, 1, 1).data.join(), n];
          }));
          const pack = JSON.parse(canvas.closest('figure').dataset.pack);
          const rows = pack.rows.length, height = box.height / rows;
          let gutter = 0;
          while (!known.has(pen.getImageData(gutter, height / 2, 1, 1).data.join())) {
            if (++gutter > canvas.width) return [];  // drawn in other colours than those of now
          }
          const width = (canvas.width - gutter) / pack.columns;
          return [...Array(rows).keys()].map(r => [...Array(pack.columns).keys()].map(c =>
            known.get(pen.getImageData(gutter + (c + .4) * width, (r + .5) * height, 1, 1)
              .data.join()) || '?'));
        })()""".replace("METHOD", method)
    )


def allowed(share: float) -> set[str]:
    """The classes of a load that is known within three per cent."""
    found = {shade(share * k) for k in (1 / 1.03, 1.0, 1.03)}
    return {"dead" if c == DEAD_SHADE else f"h{SHADES.index(c)}" for c in found}


def choose(tab: Page, order: str) -> None:
    tab.run(f"document.querySelector('.explorer input[value={order}]').id = 'choice-{order}'")
    tab.click(f"#choice-{order}")


def test_the_slider_shows_the_loads_of_each_step(page, folder):
    run = read_run(folder / "mixed" / "none-0")
    page.run("document.querySelector('.explorer input[type=range]').focus()")
    page.press("Home")
    choose(page, "own")
    page.run("document.querySelector('.explorer input[type=range]').focus()")
    for snapshot in run.snapshots:
        assert texts(page, ".explorer output")[0] == f"{snapshot['step']} · training batches"
        for drawn, load in zip(cells(page, "none"), snapshot["load"], strict=True):
            expected = [relative(load)[e] or 0.0 for e in range(len(load))]
            assert all(c in allowed(r) for c, r in zip(drawn, expected, strict=True))
        page.press("ArrowRight")
    assert texts(page, ".explorer output")[0] == "60 · evaluation"
    choose(page, "sorted")
    for drawn, load in zip(cells(page, "none"), run.evals[-1]["load"], strict=True):
        expected = sorted((r or 0.0 for r in relative(load)), reverse=True)
        assert all(c in allowed(r) for c, r in zip(drawn, expected, strict=True))


def test_the_line_of_loads_by_rank_follows_the_slider(page):
    line = "document.querySelector('svg.sorted .series[data-method=none] .line').getAttribute('d')"
    last = page.run(line)
    page.run("document.querySelector('.explorer input[type=range]').focus()")
    page.press("Home")
    first = page.run(line)
    assert first != last
    page.run("dispatchEvent(new Event('beforeprint'))")  # paper shows the end, as its maps do
    assert page.run(line) != first
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run(line) == first
    page.press("End")
    drawn, server = (
        [float(x) for x in re.findall(r"[\d.]+", path)] for path in (page.run(line), last)
    )
    assert drawn == pytest.approx(server, abs=0.2)


def test_playing_ends_at_the_end(page):
    page.click(".explorer .play")
    page.wait("document.querySelector('.explorer output').textContent.startsWith('20')")
    page.wait("document.querySelector('.explorer .play').ariaLabel === 'Play'")
    assert texts(page, ".explorer output")[0] == "60 · evaluation"


def test_a_cell_says_its_load(page, folder):
    load = relative(read_run(folder / "mixed" / "phi-0").evals[-1]["load"][0])
    page.hover(".explorer figure[data-method=phi] canvas", across=0.6, down=0.2)
    found = re.search(r"layer 0, expert (\d+)\n+([\d.]+)× an even share, rank (\d+)", tip(page))
    assert found is not None
    expert, value, rank = int(found[1]), float(found[2]), int(found[3])
    assert value == pytest.approx(load[expert], rel=0.09)  # 3 %, and two digits
    assert abs(sorted(load, reverse=True).index(load[expert]) + 1 - rank) <= 2
    page.hover("h1")
    assert tip(page) is None
    page.run("document.querySelector('.explorer figure[data-method=phi] canvas').focus()")
    page.press("ArrowRight")
    page.press("ArrowDown")
    assert tip(page).startswith("layer 1, expert ")


def test_curves_say_their_values(page, folder):
    section = summarise(find_runs(folder))[0]
    page.hover(".stack svg.chart", across=0.5, down=0.5)
    lines = tip(page).splitlines()
    step = float(lines[0].removeprefix("step "))
    shown = dict(zip(lines[1::2], lines[2::2], strict=True))
    assert set(shown) == {m.label for m in section.methods}
    for method in section.methods:
        (point,) = [p for p in curve(method.used, "maxvio", 1) if p.step == step]
        assert float(shown[method.label]) == pytest.approx(point.mean, rel=0.02, abs=0.03)
    crosses = "[...document.querySelectorAll('.stack')][0].querySelectorAll('.cross')"
    assert page.run(f"[...{crosses}].every(c => c.getAttribute('visibility') === 'visible')")
    page.run("document.querySelector('.stack svg.chart').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run("tip.hidden") is False
    page.press("Escape")
    assert tip(page) is None


def test_marks_say_what_they_are(page, folder):
    method = summarise(find_runs(folder))[0].methods[0]
    page.hover(".wide .series[data-method=phi] .mark")
    assert method.estimates["maxvio"].text(3) in tip(page)
    page.hover(".discs .disc")
    assert re.search(r"\d+ of 64 experts: promised about .*×, got about .*×", tip(page))


def test_every_column_explains_itself(page):
    count = page.run(
        "document.querySelectorAll('section.mode')[0].querySelectorAll('.help').length"
    )
    assert count == 10  # no column for step times: these runs did not take turns
    page.click(".help[popovertarget=help-maxvio]")
    assert page.run("document.querySelector('#help-maxvio').matches(':popover-open')")
    assert "Concerning" in page.run("document.querySelector('#help-maxvio').innerText")
    page.press("Escape")
    assert not page.run("document.querySelector('#help-maxvio').matches(':popover-open')")


def test_pairs_say_how_often_they_serve_together(tab, tmp_path):
    lift = [[0.0, 4.0, 1.0, 2.0, None, 0.5], [1.0] * 6]
    pairs = {"coactivation_layers": [0, 1], "coactivation": lift}
    write_run(tmp_path / "run", "phi", experts=4, **pairs)
    opened(tab, write_report(find_runs(tmp_path), tmp_path / "r.html"))
    tab.run("document.querySelector('[data-kind=pairs] canvas').focus()")
    said = []
    for key in ("ArrowRight", *["ArrowRight"] * 3, "ArrowDown"):
        tab.press(key)
        said.append(tip(tab).splitlines())
    # The chain begins with the closest pair, 0 and 2, and goes on to whom 2 serves with: 1.
    assert said[0] == ["experts 0 and 0", "the same expert"]
    assert said[1] == ["experts 0 and 2", "4.0× as often as by chance"]
    assert said[2] == ["experts 0 and 1", "never on one token"]
    assert said[3] == ["experts 0 and 3", "1.0× as often as by chance"]
    assert said[4] == ["experts 2 and 3", "0.50× as often as by chance"]
    assert tab.errors == []


def test_without_script_and_on_paper_the_maps_are_still_there(tab, folder):
    file = folder / "report.html"
    shown = "getComputedStyle(document.querySelector('{}')).display"
    opened(tab, file)
    assert tab.run(shown.format(".explorer .still")) == "none"
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.run(shown.format(".explorer .still")) == "block"
    assert tab.run(shown.format(".explorer canvas")) == "none"
    assert tab.run(shown.format(".explorer .controls")) == "none"
    assert len(tab.call("Page.printToPDF", printBackground=True)["data"]) > 50_000
    tab.size(*DESKTOP)
    tab.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(file.as_uri())
        assert tab.run(shown.format(".explorer .still")) == "block"
        assert tab.run(shown.format(".explorer .controls")) == "none"
        assert tab.run("document.querySelector('canvas')") is None
    finally:
        tab.call("Emulation.setScriptExecutionDisabled", value=False)


def test_dark_comes_to_the_maps_of_an_open_page(page):
    light = cells(page, "none")
    page.size(*DESKTOP, dark=True)
    page.wait("getComputedStyle(document.body).backgroundColor === 'rgb(21, 23, 26)'")
    end = time.monotonic() + 10  # the page hears of it a frame later than its style
    while not (found := cells(page, "none")) and time.monotonic() < end:
        time.sleep(0.05)
    assert found == light  # the same classes, in the colours of now


def test_names_cannot_bring_markup(tab, tmp_path):
    bad = "<img src=x onerror='window.evil=1'>\"'><b id=evil>&amp;</b>${1}</script>`"
    header = {"name": bad, "commit": bad, "recipe": {bad: bad}, "data": {"domains": [bad] * 4}}
    header |= {"model": {"layers": [bad, bad], "num_experts": 32, "top_k": 4}}
    for i, method in enumerate((bad, "phi")):
        write_run(tmp_path / str(i), method, header=header)
    file = write_report(find_runs(tmp_path), tmp_path / "report.html", title=bad)
    opened(tab, file)
    tab.hover(".stack svg.chart")
    tab.hover("[data-kind=domains] canvas", across=0.7)
    assert "<img src=x" in tip(tab)
    assert tab.run("window.evil === undefined && !document.querySelector('img')")
    assert tab.run("document.title") == bad
    assert len(tab.requests) == 1
    assert tab.errors == []


@pytest.mark.parametrize(
    "options",
    [
        {"snapshots": False},
        {"evaluate": False, "end": False, "stop": 30},
        {"evaluate": False, "snapshots": False, "stop": 0, "end": False},
        {"loss": None, "maxvio": None, "load": None, "domain_load": [], "dead_experts": None},
        {"load": [[float("nan")] * 4, [0.0] * 4], "domain_load": [[[0.0, 0.0]], [[1.0]]]},
        {"load": "much", "domain_load": {"a": 1}, "maxvio": "high", "soft": [[]]},
        {"load": [[0.5, 0.5], [1.0]], "soft": [[1.0]], "domain_load": [[[1.0]], "no"]},
        {"header": {"model": None, "data": None, "seed": None, "recipe": None}},
    ],
)
def test_whatever_a_log_lacks_the_page_works(tab, tmp_path, options: dict[str, Any]):
    write_run(tmp_path / "run", "phi", **options)
    path = write_run(tmp_path / "cut", "none") / LOG_NAME
    path.write_bytes(path.read_bytes()[:-9])
    opened(tab, write_report(find_runs(tmp_path), tmp_path / "r.html"))
    assert "φ-balancing" in texts(tab, "table.methods tbody th")[0]
    assert tab.errors == []


def test_a_large_model_opens_fast(tab, tmp_path):
    write_run(tmp_path / "run", "phi", steps=120, snapshot_every=2, experts=128, layers=48)
    file = write_report(find_runs(tmp_path), tmp_path / "r.html")
    assert file.stat().st_size < 700_000
    opened(tab, file)
    spent = tab.run("performance.now()")
    assert spent < 5000  # about half a second on an idle machine
    stops = tab.run("document.querySelector('.explorer input[type=range]').max")
    assert int(stops) == 60
    assert tab.errors == []


def test_a_live_page_follows_the_run(tab, tmp_path):
    write_runs(tmp_path, methods=("switch",), seeds=(0,), batchings=("mixed",))
    log = RunLog(tmp_path / "running")
    log.write("header", name="synthetic", method="phi", seed=0, batching="mixed", steps=60)
    log.write("step", step=1, loss=3.0, maxvio=2.0)
    server = ReportServer([tmp_path])
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        tab.errors.clear()
        tab.size(*DESKTOP)
        tab.open(server.url)
        ready(tab)
        assert "this page follows the run" in texts(tab, ".live")[0]
        tab.click(".legend [data-method=switch]")
        log.write("step", step=2, loss=2.9, maxvio=1.9)
        log.write("snapshot", step=2, load=[[0.5, 0.25, 0.25, 0.0]])
        tab.wait("document.querySelector('table.runs').textContent.includes('2 / 60')")
        ready(tab)
        assert (
            tab.run("document.querySelector('.legend [data-method=switch]').ariaPressed") == "false"
        )
        assert cells(tab, "phi") == [["h9", "h6", "h6", "dead"]]
        assert tab.errors == []
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        log.close()
