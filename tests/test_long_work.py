"""Long work is visible, goes on after Ctrl-C and can be made longer; flags and counts in words."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from moebalance.lab import progress, workers
from moebalance.lab.cli import app
from moebalance.lab.console import counted
from moebalance.lab.recipe import FINAL, Recipe
from moebalance.lab.train import train_run
from moebalance.lab.workers import Job, share_cores
from moebalance.runlog import LOG_NAME, read_run
from synthetic_runs import write_run

MODEL = {
    "architecture": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Six steps on one small text, a checkpoint every second step."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text("".join(f"{number} run! go? sit, eat;\n" for number in range(300)))
    train = {"steps": 6, "batch_size": 2, "eval_sequences": 2, "save_every": 2}
    table = {"model": MODEL, "data": {"source": str(text), "seq_len": 16}, "train": train}
    return Recipe.parse(table, source="small.toml")


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(recipe, folder)
    return folder


def run(recipe: Recipe, folder: Path, **changes: object) -> Path:
    settings = {"method": "phi", "seed": 0, "batching": "mixed", "save_model": True, **changes}
    return train_run(recipe, folder=folder, **settings)


def changed(recipe: Recipe, **train: object) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **train))


# --- resume ---------------------------------------------------------------------------------------


def test_resume_says_that_there_is_no_checkpoint(recipe, tmp_path, caplog):
    run(changed(recipe, steps=1, save_every=0), tmp_path, resume=True)
    assert f"There is nothing to resume in {tmp_path}: it holds no whole checkpoint" in caplog.text
    assert read_run(tmp_path).status == "complete"


def test_resume_says_that_a_run_is_complete_and_leaves_it(recipe, finished, caplog):
    before = (finished / LOG_NAME).read_bytes()
    run(recipe, finished, resume=True)
    assert "all 6 steps are done. Give a larger [train] steps" in caplog.text
    assert (finished / LOG_NAME).read_bytes() == before


def test_resume_names_only_the_keys_that_differ(recipe, finished):
    other = replace(changed(recipe, steps=4), model={**MODEL, "num_local_experts": 8})
    other = replace(other, methods={"phi": {"strength": 0.5}})
    with pytest.raises(ValueError, match="of another run") as refused:
        run(other, finished, resume=True, seed=3)
    message = str(refused.value)
    for difference in ("seed: 0 → 3", "[model] num_local_experts: 4 → 8", "[train] steps: 6 → 4"):
        assert difference in message
    assert "method: PhiBalancing(" in message
    assert "batch_size" not in message
    assert "hidden_size" not in message


def test_what_does_not_change_a_run_may_differ(recipe, finished, caplog):
    compare = replace(recipe.compare, seeds=(5,))
    other = replace(recipe, name="renamed", compare=compare, methods={"switch": {"strength": 1.0}})
    run(other, finished, resume=True)
    assert "all 6 steps are done" in caplog.text


def test_a_run_can_be_made_longer(recipe, tmp_path):
    folder = tmp_path / "run"
    run(recipe, folder)
    before = read_run(folder)
    path = run(changed(recipe, steps=9), folder, resume=True)
    longer = read_run(path)
    assert [row["step"] for row in longer.steps] == list(range(1, 10))
    assert longer.steps[:6] == before.steps
    assert longer.status == "complete"
    assert longer.header["steps"] == longer.header["recipe"]["train"]["steps"] == 9
    assert longer.header["earlier_steps"] == [6]
    assert {**longer.header, "steps": 6, "recipe": 0} == {
        **before.header,
        "recipe": 0,
        "earlier_steps": [6],
    }
    # The learning rate follows the longer schedule from here on.
    whole = read_run(run(changed(recipe, steps=9), tmp_path / "whole"))
    assert [r["lr"] for r in longer.steps[6:]] == pytest.approx([r["lr"] for r in whole.steps[6:]])
    assert (folder / FINAL / "config.json").is_file()
    again = read_run(run(changed(recipe, steps=10), folder, resume=True))
    assert again.header["earlier_steps"] == [6, 9]


def test_nothing_is_said_of_missing_keys_where_resume_has_restored_the_experts(
    recipe, tmp_path, caplog
):
    """Transformers saves the experts of a Mixtral under other names than the model has."""
    folder = tmp_path / "run"
    log = run(changed(recipe, steps=4), folder, save_model=False)
    whole = read_run(log).steps
    shutil.rmtree(folder / "checkpoint-4")
    again = read_run(run(changed(recipe, steps=4), folder, resume=True, save_model=False))
    assert [row["loss"] for row in again.steps] == [row["loss"] for row in whole]
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text


def test_a_run_whose_text_shifts_half_way_cannot_be_made_longer(recipe, finished, tmp_path):
    header, *rows = (finished / LOG_NAME).read_text().splitlines()
    folder = tmp_path / "shift"
    folder.mkdir()
    header = json.dumps({**json.loads(header), "batching": "shift"})
    (folder / LOG_NAME).write_text("\n".join([header, *rows]) + "\n")
    (folder / "checkpoint-6").symlink_to(finished / "checkpoint-6")
    with pytest.raises(ValueError, match=r"another run: \[train\] steps: 6 → 9\. "):
        run(changed(recipe, steps=9), folder, resume=True, batching="shift")


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.survives(
    "Killed and resumed",
    "Ctrl-C in a comparison",
    "goes on: log and report are whole",
)
@pytest.mark.parametrize("save_every", [2, 0])
def test_ctrl_c_leaves_a_whole_log_a_report_that_works_and_the_command_to_go_on(
    recipe, tmp_path, save_every
):
    model = "\n".join(f"{key} = {json.dumps(value)}" for key, value in MODEL.items())
    (tmp_path / "long run.toml").write_text(
        f"[model]\n{model}\n[data]\nsource = {json.dumps(recipe.data.source)}\nseq_len = 16\n"
        f"[train]\nsteps = 100000\nbatch_size = 2\nsave_every = {save_every}\n"
    )
    words = ["train", "long run.toml", "--out", "run", "--method", "phi(strength=0.1)"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moebalance", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / LOG_NAME
    try:
        deadline = time.monotonic() + 200
        while not (log.is_file() and log.read_text().count("\n") >= 5):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        # Python drops an interrupt that falls into a finaliser; a person would press again.
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=60)
                break
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert read_run(log).status == "interrupted"
    reported = CliRunner().invoke(app, ["report", str(log.parent)])
    assert reported.exit_code == 0, reported.output
    again = "moebalance train 'long run.toml' --out run --method 'phi(strength=0.1)'"
    if save_every:
        assert f"Interrupted; what is on disk is whole. Go on with: {again} --resume\n" in output
    else:
        assert "before a checkpoint was saved ([train] save_every says how often)." in output
        assert f"Begin again with: {again}\n" in output


# --- progress without a terminal ------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_comparison_prints_a_line_a_run_and_one_every_few_minutes(tmp_path):
    jobs = [Job(m, 0, "mixed", tmp_path / m) for m in ("kept", "phi", "none", "switch")]
    kept, phi, none, switch = jobs
    text, clock = io.StringIO(), Clock()
    lines = progress.Lines(Console(file=text, width=80), steps=100, clock=clock)
    states = {kept: "kept", phi: "running", none: "waiting", switch: "waiting"}
    clock.now = 60.0
    lines.tell({phi: 30}, states)
    assert text.getvalue() == ""
    write_run(phi.folder, "phi", steps=100, loss=1.5, maxvio=0.25)
    clock.now = 100.0
    for _ in range(2):  # said once
        lines.tell({none: 0}, {**states, phi: "done", none: "running"})
    assert text.getvalue() == (
        "2 of 4: phi · seed 0 · mixed: loss 1.500, MaxVio 0.25; about 3 min left\n"
    )
    clock.now = 100.0 + progress.EVERY_S
    states = {**states, phi: "done", none: "running", switch: "failed: out of memory"}
    lines.tell({none: 40}, states)
    clock.now += progress.EVERY_S
    lines.tell({none: 80}, states)
    _, failed, running = text.getvalue().splitlines()
    assert failed.startswith("3 of 4: switch · seed 0 · mixed: failed: out of memory; about ")
    assert running == (
        "3 of 4 runs ended; none · seed 0 · mixed at step 80 of 100; about 1 min left"
    )


def test_a_terminal_gets_bars_and_a_log_gets_lines():
    with progress.follow_jobs(Console(file=io.StringIO()), 1, 10) as tell:
        assert isinstance(tell.__self__, progress.Lines)
    terminal = Console(file=io.StringIO(), force_terminal=True)
    with progress.follow_jobs(terminal, 1, 10) as tell:
        assert isinstance(tell.__self__, progress.Bars)
        tell({Job("phi", 0, "mixed", Path("x")): 3}, {})


def test_one_run_without_a_terminal_prints_a_line_every_few_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    log = write_run(tmp_path, "phi", steps=40, stop=30, end=False, evaluate=False) / LOG_NAME
    text = io.StringIO()
    with progress.follow_log(Console(file=text, width=30), log, 40, "phi"):
        deadline = time.monotonic() + 30
        while not text.getvalue().count("\n") >= 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert text.getvalue().splitlines()[0] == "phi: step 30 of 40; under a minute left"


# --- cores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("omp", "asked", "runs", "expected"),
    [
        (None, None, 10, (6, 1)),
        (None, None, 2, (2, 3)),
        (None, 3, 10, (3, 2)),
        ("2", None, 10, (3, 2)),
        ("4,2", None, 10, (1, 4)),
        ("1", 4, 10, (4, 1)),
        ("nonsense", None, 10, (6, 1)),
    ],
)
def test_workers_and_threads_keep_to_affinity_and_omp_num_threads(
    monkeypatch, omp, asked, runs, expected
):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert share_cores(runs, asked) == expected


def test_without_affinity_all_cores_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert workers.share_cores(9) == (5, 1)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [[], *([command.callback.__name__] for command in app.registered_commands)],
    ids=lambda words: words[0] if words else "moebalance",
)
def test_help_shows_words_in_place_of_python_types(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    for type_name in ("<bool>", "<int", "<list", "<str", "<Path"):
        assert type_name not in done.output


def test_one_is_not_plural():
    assert [counted(n, "kind") for n in (0, 1, 2)] == ["0 kinds", "1 kind", "2 kinds"]


@pytest.mark.parametrize("command", [["--help"], ["compare", "--help"], ["report", "--help"]])
def test_help_comes_without_torch(command):
    code = (
        "import sys; from moebalance.lab.cli import app\n"
        "try: app()\n"
        "finally: print('\\n'.join(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines())
    assert "moebalance.lab.console" in loaded
    assert not {"torch", "transformers", "datasets", "jinja2"} & loaded
