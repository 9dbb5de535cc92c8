"""What every command prints in a terminal of 80 columns, word for word, kept in tests/golden/.

GOLDEN=write pytest tests/test_golden.py    writes the files anew; look at the difference
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebalance.lab import console
from moebalance.lab.cli import app
from moebalance.words.methods import method_classes
from synthetic_runs import write_run
from test_traces import choices, megatron_rows, write_lines

FOLDER = Path(__file__).parent / "golden"
NAMES = [str(command.callback.__name__) for command in app.registered_commands]
TWO = (
    "PhiBalancing(potential=NegativeEntropy(), strength=0.01, memory_tokens=10000)",
    "PhiBalancing(potential=NegativeEntropy(), strength=0.03, memory_tokens=10000)",
)
CASES = {
    "moebalance": ["--help"],
    **{f"{name}-help": [name, "--help"] for name in NAMES},
    "report": ["report", "runs"],
    "report-trace": ["report", "trace.jsonl", "--out", "r.html"],
    "watch": ["watch", "runs", "--once"],
    "watch-one": ["watch", "runs/none", "--once"],
    "track": ["track", "runs", "--to", "tensorboard"],
    "doctor-runs": ["doctor", "runs"],
    "doctor-model": ["doctor", "mixtral"],
    "doctor-recipe": ["doctor", "mine.toml"],
    "doctor-empty": ["doctor", "empty"],
    "demo-refused": ["demo", "--methods", "fi"],
    "train-refused": ["train", "mine.toml"],
    "compare-refused": ["compare", "nothing.toml"],
    "finetune-refused": ["finetune", "fresh.toml"],
    "bench-refused": ["bench", "--rules", "softmx"],
    "track-refused": ["track", "runs", "--to", "mlflow"],
    "report-refused": ["report", "empty"],
    "watch-refused": ["watch", "empty"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    for seed in (0, 1):
        for i, words in enumerate(TWO):
            header = {"method_repr": words, "parts": None}
            write_run(folder / "runs" / f"phi-{i}-{seed}", "phi", seed=seed, header=header)
    write_run(folder / "runs" / "none", "none")
    write_lines(folder / "trace.jsonl", megatron_rows(choices(), 0))
    (folder / "empty").mkdir()
    (folder / "mine.toml").write_text("[train]\nstpes = 3\n")
    (folder / "fresh.toml").write_text("[data]\nsource = 'python'\n")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_command_prints_what_it_printed_in_80_columns(name, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    for each in (console.console, console.errors):
        monkeypatch.setattr(each, "_width", 80)
    done = CliRunner().invoke(app, CASES[name], prog_name="moebalance")
    found = done.output.replace(str(place), "/here") + f"exit code {done.exit_code}\n"
    found = found.replace(", ".join(sorted(method_classes())), "every method")
    found = "".join(f"{line.rstrip()}\n" for line in found.splitlines())
    file = FOLDER / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        FOLDER.mkdir(exist_ok=True)
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


def test_every_command_is_kept_and_nothing_else():
    kept = {file.stem for file in FOLDER.glob("*.txt")}
    assert kept == set(CASES)
    assert {name for name in NAMES if any(words[0] == name for words in CASES.values())} == set(
        NAMES
    )


def test_tables_and_help_keep_to_80_columns():
    for file in FOLDER.glob("*.txt"):
        # Errors and paths are never wrapped, so that they can be copied.
        lines = [line for line in file.read_text("utf-8").splitlines() if line[:1] in "│┃╭╰┏└ "]
        assert max(map(len, lines), default=0) <= 80, file.name
