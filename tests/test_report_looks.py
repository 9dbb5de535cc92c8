"""What was looked at in pictures of the page, at 1280 and at 390 pixels, and must stay so."""

from __future__ import annotations

import pytest

from browser import DESKTOP, PHONE
from moebalance.report import summarise
from moebalance.runlog import find_runs
from test_report_browser import FIRST, folder, opened, pytestmark, tab

__all__ = ["folder", "pytestmark", "tab"]  # fixtures, and the mark that skips without a browser


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
