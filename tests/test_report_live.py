"""Reports of runs that go on: the server on this machine, and the view in the terminal."""

from __future__ import annotations

import http.client
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moebalance.lab.cli import app
from moebalance.report import live
from moebalance.report.live import ReportServer
from moebalance.report.watch import sparkline, view
from moebalance.runlog import LOG_NAME, RunLog, find_runs
from synthetic_runs import write_run, write_runs


@contextmanager
def serving(*folders: Path) -> Iterator[ReportServer]:
    server = ReportServer(folders)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server: ReportServer, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


def test_a_folder_whose_name_is_no_text_is_served(tmp_path):
    folder = tmp_path / os.fsdecode(b"a\xff")
    write_run(folder, "phi")
    with serving(tmp_path) as server:
        assert ask(server, "/stamp")[0] == 200
        assert "φ-balancing" in ask(server, "/")[1]


def test_it_serves_the_report_and_says_when_it_changed(tmp_path):
    write_run(tmp_path / "a", "phi")
    with serving(tmp_path) as server:
        assert server.server_address[0] == "127.0.0.1"
        _, before = ask(server, "/stamp")
        status, page = ask(server, "/")
        assert status == 200
        assert f'data-stamp="{before}"' in page
        assert "φ-balancing" in page
        assert ask(server, "/stamp")[1] == before
        write_run(tmp_path / "b", "switch")
        assert ask(server, "/stamp")[1] != before
        assert "Switch loss" in ask(server, "/page")[1]


def test_it_answers_to_its_own_name_only(tmp_path):
    write_run(tmp_path / "a", "phi")
    with serving(tmp_path) as server:
        for path in ("/", "/page", "/stamp"):
            status, text = ask(server, path, host="elsewhere.example")
            assert status == 403
            assert "φ" not in text
        assert ask(server, "/", host=f"localhost:{server.server_port}")[0] == 200
        assert ask(server, "/../secret")[0] == 404


@pytest.mark.survives(
    "Files and pages",
    "A visitor of the live page connects and sends nothing, or half a question",
    "goes on: the socket is closed after 10 s, and others are answered meanwhile",
)
def test_a_silent_visitor_is_sent_away_and_others_are_answered(tmp_path, monkeypatch):
    assert live._Handler.timeout == 10
    monkeypatch.setattr(live._Handler, "timeout", 0.3)
    with serving(tmp_path) as server:
        visitors = [socket.create_connection(server.server_address[:2], 20) for _ in range(8)]
        visitors[0].sendall(b"GET /stamp HT")
        assert ask(server, "/stamp")[0] == 200
        for visitor in visitors:
            with visitor:
                assert visitor.recv(1) == b""


def test_it_waits_for_the_first_run(tmp_path):
    folder = tmp_path / "later"
    with serving(folder) as server:
        assert "Waiting for a run" in ask(server, "/")[1]
        with RunLog(folder / "run") as log:
            log.write("header", method="phi", seed=0, steps=5)
            assert "φ-balancing" in ask(server, "/")[1]


def test_a_log_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path):
    write_run(tmp_path / "good", "phi")
    bad = tmp_path / "<bad>" / LOG_NAME
    bad.parent.mkdir()
    bad.write_text("")
    with serving(tmp_path) as server:
        page = ask(server, "/")[1]
    assert "φ-balancing" in page
    assert "&lt;bad&gt;/log.jsonl is empty" in page


def test_a_page_that_stays_asks_nobody(tmp_path):
    from moebalance.report import write_report

    write_run(tmp_path / "a", "phi")
    page = write_report(find_runs(tmp_path), tmp_path / "r.html").read_text("utf-8")
    assert "<body>" in page
    assert 'class="live"' not in page


# In the terminal


def shown(folder: Path, width: int = 120) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(view(find_runs(folder), width=width))
    return captured.get()


def test_sparklines_rise_with_their_values():
    assert sparkline([float(i) for i in range(8)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0] * 4 + [None] * 4 + [2.0] * 4, 3) == "▁ █"
    assert len(sparkline([float(i) for i in range(1000)], 40)) == 40
    assert sparkline([None, None], 5) == "  "
    assert sparkline([], 5) == ""


def test_one_run_shows_its_layers(tmp_path):
    write_run(tmp_path, "phi", load=[[0.5, 0.25, 0.25, 0.0], [0.25] * 4])
    lines = shown(tmp_path).splitlines()
    assert any("φ-balancing 0" in line and "60/60 complete" in line for line in lines)
    assert any("layer 0 ▅▃▃·  MaxVio 1.00" in line for line in lines)
    assert any("layer 1 ▃▃▃▃  MaxVio 0.00" in line for line in lines)


@pytest.mark.parametrize("width", [40, 70, 120])
def test_the_view_keeps_to_the_terminal(tmp_path, width):
    write_runs(tmp_path, seeds=(0,), steps=200)
    text = shown(tmp_path, width)
    assert max(map(len, text.splitlines())) <= width
    write_run(tmp_path / "one", "phi", experts=256, layers=40)
    assert max(map(len, shown(tmp_path / "one", width).splitlines())) <= width


def test_a_running_run_says_how_long_it_will_take(tmp_path):
    write_run(tmp_path / "run", "none", stop=10, evaluate=False, end=False)
    text = shown(tmp_path / "run")
    assert "10/60" in text
    assert "5 s" in text  # 50 steps of 0.1 s


@pytest.mark.parametrize(
    "options",
    [
        {"evaluate": False, "snapshots": False, "stop": 0, "end": False},
        {"load": "much", "snapshots": False},
        {"load": [[None] * 4, [0.0] * 4], "snapshots": False},
        {"header": {"model": None, "steps": None, "seed": None}},
    ],
)
def test_the_view_forgives_what_a_log_lacks(tmp_path, options):
    write_run(tmp_path / "run", "phi", **options)
    assert "φ-balancing" in shown(tmp_path / "run")


SETTINGS = (
    "PhiBalancing(potential=NegativeEntropy(), strength=0.001, memory_tokens=10000)",
    "PhiBalancing(potential=NegativeEntropy(), strength=0.03, memory_tokens=10000)",
)


def test_two_settings_of_one_method_are_told_apart_in_80_columns(tmp_path):
    for i, method_repr in enumerate(SETTINGS):
        header = {"method_repr": method_repr, "parts": None}
        write_run(tmp_path / str(i), "phi", header=header)
    write_run(tmp_path / "z", "none")
    text = shown(tmp_path, 80)
    lines = [line for line in text.splitlines() if "60/60" in line]
    assert ["strength=0.001" in line for line in lines] == [True, False, False]
    assert ["strength=0.03" in line for line in lines] == [False, True, False]
    assert text.count("potential=NegativeEntropy") == 1  # what is common is said once
    assert text.count("φ-balancing\n") + text.count("φ-balancing  ") == 1  # one heading
    assert "No balancing 0" in text


def test_a_long_difference_is_wrapped_and_not_cut(tmp_path):
    for i in (1, 2):
        words = f"PhiBalancing(potential=Tempered(NegativeEntropy(), temperature=0.{i}5))"
        write_run(tmp_path / str(i), "phi", header={"method_repr": words, "parts": None})
    text = "".join(shown(tmp_path, 80).split())
    assert "temperature=0.15" in text
    assert "temperature=0.25" in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        (({"steps": 60}, {"steps": 90}), ("steps=60", "steps=90")),
        (({"recipe": {"lr": 0.1}}, {"recipe": {"lr": 0.2}}), ("lr=0.1", "lr=0.2")),
        (({}, {}), ("first", "second")),
        (
            ({"recipe": {"a": 1, "b": 1, "c": 1}}, {"recipe": {"a": 2, "b": 2, "c": 2}}),
            ("first", "second"),
        ),
    ],
)
def test_twins_of_one_setting_are_named_by_what_differs_else_by_folder(tmp_path, headers, words):
    for name, header in zip(("first", "second"), headers, strict=True):
        write_run(tmp_path / name, "phi", header=header)
    text = shown(tmp_path, 120)
    assert all(text.count(word) == 1 for word in words)


def test_the_command_shows_runs_until_they_end(tmp_path):
    write_run(tmp_path / "run", "phi")
    for arguments in (["--once"], []):
        found = CliRunner().invoke(app, ["watch", str(tmp_path), *arguments])
        assert found.exit_code == 0
    missing = CliRunner().invoke(app, ["watch", str(tmp_path / "nothing")])
    assert missing.exit_code == 2


@pytest.mark.parametrize("arguments", [["--once"], []], ids=["once", "until they end"])
def test_the_command_ends_with_an_error_if_a_log_cannot_be_read(tmp_path, arguments):
    (tmp_path / "log.jsonl").write_text("junk")
    found = CliRunner().invoke(app, ["watch", str(tmp_path), *arguments])
    assert found.exit_code == 1
    assert "not a moebalance run log" in found.output.replace("\n", " ")
    write_run(tmp_path / "run", "phi")
    found = CliRunner().invoke(app, ["watch", str(tmp_path), *arguments])
    assert found.exit_code == 1
    assert "φ-balancing" in found.output
