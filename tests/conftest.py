"""One thread a process, one profile for all property tests, and the fixtures that files share."""

import gc
import multiprocessing
import os
from pathlib import Path

import hypothesis
import pytest
import torch

from forks import FORKS

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, not in a pool of new ones
torch.set_num_threads(1)
hypothesis.settings.register_profile("moebalance", deadline=None, derandomize=True)
hypothesis.settings.load_profile("moebalance")


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the tests import: half a million objects, for ever alive."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say plainly that the report was not looked at in a browser, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    reports = [
        report
        for report in skipped
        if "test_report_browser" in report.nodeid or "test_report_looks" in report.nodeid
    ]
    if reports:
        reason = str(reports[0].longrepr[2]).removeprefix("Skipped: ")
        count = f"{len(reports)} browser tests of the report were SKIPPED"
        terminalreporter.write_line(f"{count}: {reason}", yellow=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two domains in sub-folders and one of plain files; every file is different text."""
    root = tmp_path / "texts"
    for domain, word in (("letters", "abc "), ("digits", "123 "), ("", "!? ")):
        (root / domain).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            (root / domain / f"{number}.txt").write_text(f"file {number} " + word * 100)
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three whole runs of every method in both batching modes; the tests only read them."""
    # Imported here: the shape checker must be installed before the first import of the library.
    from moebalance.runlog import find_runs
    from synthetic_runs import write_runs

    return find_runs(write_runs(tmp_path_factory.mktemp("runs")))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of a comparison need not import torch."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORKS)


@pytest.fixture(scope="session")
def interpreted():
    """Call a function where Triton interprets: another process, one for all files."""
    from kernel_processes import caller, process

    with process({"TRITON_INTERPRET": "1"}) as pool:
        yield caller(pool)
