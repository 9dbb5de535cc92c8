"""The main job end to end, small: train, compare, resume, interrupt, report, command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import moebalance as mb
from moebalance import metrics
from moebalance.lab.checkpoints import last_whole_checkpoint
from moebalance.lab.cli import app
from moebalance.lab.compare import compare, is_complete, plan
from moebalance.lab.evaluate import evaluate
from moebalance.lab.inputs import build_model
from moebalance.lab.recipe import Recipe
from moebalance.lab.text.batches import TokenDataset
from moebalance.lab.train import train_run
from moebalance.lab.workers import end_with_parent
from moebalance.runlog import LOG_NAME, read_run
from moebalance.words.methods import build_method

MODEL = {
    "architecture": "qwen3_moe",
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of a few files each."""
    root = tmp_path_factory.mktemp("text")
    for domain, words in {"animals": "cat dog bird fish ", "numbers": "1 23 456 7890 "}.items():
        (root / domain).mkdir()
        for part in range(6):
            (root / domain / f"{part}.txt").write_text(f"{part} {words * 200}")
    return root


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return Recipe.parse(
        {
            "name": "small",
            "model": MODEL,
            "data": {"source": str(text), "seq_len": 32},
            "train": {
                "steps": 6,
                "batch_size": 2,
                "accumulation": 2,
                "eval_sequences": 8,
                "snapshot_every": 3,
            },
            "compare": {"methods": ["none", "phi"], "seeds": [0], "batching": ["one-domain"]},
        },
        source="small.toml",
    )


def run(recipe: Recipe, folder: Path, **changes: object) -> Path:
    settings = {"method": "phi+loss-free", "seed": 0, "batching": "mixed", **changes}
    return train_run(recipe, folder=folder, **settings)


def without_times(path: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("step_time_s", "wall_s", "recipe")}
        for row in rows
        if row["kind"] != "end"
    ]


def test_a_run_writes_header_steps_snapshots_evaluation_and_end(
    recipe: Recipe, tmp_path: Path
) -> None:
    log = read_run(run(recipe, tmp_path))
    assert log.status == "complete"
    assert log.header["method"] == "phi+loss-free"
    assert log.header["method_repr"].startswith("Together(PhiBalancing(")
    assert log.header["model"]["num_experts"] == 8
    assert log.header["model"]["active_parameters"] < log.header["model"]["parameters"]
    assert log.header["data"]["domains"] == ["animals", "numbers"]
    assert [row["step"] for row in log.steps] == [1, 2, 3, 4, 5, 6]
    assert log.steps[0]["tokens"] == 2 * 2 * 32
    assert {"loss", "lr", "step_time_s", "maxvio", "gini", "price_spread"} <= set(log.steps[0])
    assert [row["step"] for row in log.snapshots] == [3, 6]
    assert torch.tensor(log.snapshots[0]["load"]).sum(-1).allclose(torch.ones(2))
    (found,) = log.evals
    assert torch.tensor(found["domain_load"]).shape == (2, 2, 8)


def test_one_seed_gives_methods_the_same_start_and_the_same_order(
    recipe: Recipe, tmp_path: Path
) -> None:
    same = [read_run(run(recipe, tmp_path / m, method=m)) for m in ("none", "phi(strength=0)")]
    # A strength of 0 is no balancing: equal to the last bit, step by step.
    assert [row["loss"] for row in same[0].steps] == [row["loss"] for row in same[1].steps]
    other = read_run(run(recipe, tmp_path / "other", method="none", seed=1))
    assert other.steps[0]["loss"] != same[0].steps[0]["loss"]


@pytest.mark.survives(
    "Killed and resumed",
    "A run is interrupted, its last checkpoint is half written, and it resumes",
    "goes on: from the checkpoint before, equal to an uninterrupted run",
)
def test_interrupted_and_resumed_training_equals_uninterrupted(
    recipe: Recipe, tmp_path: Path
) -> None:
    saving = replace(recipe, train=replace(recipe.train, save_every=2))
    whole = run(saving, tmp_path / "whole")
    half = run(saving, tmp_path / "half")
    # As a kill in step 6 would leave it: no end, a cut-off line, a checkpoint not written out.
    lines = half.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("step", 0) <= 5][:-1]
    half.write_text("".join(kept) + '{"kind": "step", "st')
    (tmp_path / "half" / "checkpoint-6" / "optimizer.pt").write_bytes(b"PK\x03\x04cut")
    assert last_whole_checkpoint(tmp_path / "half").name == "checkpoint-4"
    again = run(saving, tmp_path / "half", resume=True)
    assert without_times(again) == without_times(whole)
    assert read_run(again).status == "complete"


def test_evaluation_agrees_with_a_count_by_hand(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = build_model(recipe, 257)
    balancing = mb.attach(model, mb.LossFree(speed=0.1))
    ids = torch.randint(0, 257, (6, 32))
    domains = torch.tensor([0, 0, 1, 1, 1, 0])
    found = evaluate(model, balancing, TokenDataset(ids, domains, ("a", "b")), batch_size=2)
    counts = torch.zeros(2, 2, 8)
    for layer, name in enumerate(balancing.layers):
        chosen: list[torch.Tensor] = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda _, __, output, chosen=chosen: chosen.append(output[2])
        )
        model.eval()(input_ids=ids)
        handle.remove()
        for sequence, experts in enumerate(chosen[0].view(6, -1)):
            counts[layer, domains[sequence]] += torch.bincount(experts, minlength=8)
    assert found["maxvio"] == pytest.approx(
        metrics.max_violation(counts.sum(1)).mean().item(), rel=1e-6
    )
    assert found["mi"] == pytest.approx(metrics.mutual_information(counts).mean().item(), rel=1e-5)
    assert found["loss"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert found["tokens"] == 6 * 31
    assert 0 < found["router_similarity"] < 1


def test_evaluation_measures_churn_since_the_last_one(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = build_model(recipe, 257)
    balancing = mb.attach(model, mb.NoBalancing())
    ids = torch.randint(0, 257, (4, 16))
    held_out = TokenDataset(ids, torch.zeros(4).long(), ("a",))
    choices: dict[str, torch.Tensor] = {}

    def churn() -> float | None:
        return evaluate(model, balancing, held_out, batch_size=2, choices=choices).get("churn")

    assert churn() is None
    assert churn() == 0.0
    name = list(balancing.layers)[-1]
    with torch.no_grad():
        model.get_submodule(name).weight.neg_()  # every token goes to other experts
    assert churn() == 0.5  # of two layers


def test_a_comparison_keeps_what_is_complete_and_runs_what_is_not(
    recipe: Recipe, tmp_path: Path
) -> None:
    first = compare(recipe, tmp_path, workers=1)
    assert [r.method for r in first] == ["none", "phi"]
    times = {r.path: r.path.stat().st_mtime_ns for r in first}
    broken = first[1].path
    broken.write_text("".join(broken.read_text().splitlines(keepends=True)[:4]))
    seen: list[set[str]] = []
    again = compare(
        recipe, tmp_path, workers=1, progress=lambda _, states: seen.append(set(states.values()))
    )
    assert again[0].path.stat().st_mtime_ns == times[again[0].path]
    assert again[1].status == "complete"
    assert "kept" in seen[-1]
    longer = replace(recipe, train=replace(recipe.train, steps=7))
    assert not any(is_complete(job, longer) for job in plan(longer, tmp_path))
    # The words are the same, and a default of the method was another then.
    kept, changed = plan(recipe, tmp_path)
    log = changed.folder / LOG_NAME
    log.write_text(log.read_text().replace("memory_tokens=10000", "memory_tokens=20000", 1))
    assert is_complete(kept, recipe)
    assert not is_complete(changed, recipe)


@pytest.mark.survives(
    "Killed and resumed",
    "One run of a comparison fails",
    "error: it is named, and the others stay",
)
def test_a_failing_run_is_named_and_the_others_stay(recipe: Recipe, tmp_path: Path) -> None:
    bad = replace(
        recipe,
        compare=replace(recipe.compare, methods=("none", "phi")),
        train=replace(recipe.train, learning_rate=1e30, max_grad_norm=0),
    )
    with pytest.raises(RuntimeError, match=r"2 of 2 runs failed.*NaN or infinite router logits"):
        compare(bad, tmp_path, workers=1)
    assert read_run(plan(bad, tmp_path)[0].folder / LOG_NAME).status == "failed"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "qwen3_mo"}, r"architecture='qwen3_mo'\. Did you mean 'qwen3_moe'"),
        ({**MODEL, "num_expert": 4}, "no configuration key 'num_expert'. Did you mean"),
    ],
)
def test_an_unknown_architecture_or_key_is_refused(
    recipe: Recipe, model: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_model(replace(recipe, model=model), 257)


def write_toml(path: Path, text: Path, steps: int = 3) -> Path:
    model = "\n".join(f"{key} = {json.dumps(value)}" for key, value in MODEL.items())
    path.write_text(
        f"[model]\n{model}\n[data]\nsource = {json.dumps(str(text))}\nseq_len = 32\n"
        f"[train]\nsteps = {steps}\nbatch_size = 2\neval_sequences = 4\n[method]\nname = 'phi'\n"
    )
    return path


def test_the_command_line_trains_compares_and_reports(text: Path, tmp_path: Path) -> None:
    recipe = write_toml(tmp_path / "r.toml", text)
    call = CliRunner().invoke
    done = call(app, ["train", str(recipe), "--out", str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "one" / "report.html").is_file()
    done = call(
        app,
        [
            *("compare", str(recipe), "--out", str(tmp_path / "many"), "--workers", "1"),
            *("--methods", "none,phi(strength=0.01,rate=0.5)", "--seeds", "1"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith("report.html")
    done = call(app, ["report", str(tmp_path / "many"), "--figure", str(tmp_path / "figure.svg")])
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "No recipe at nowhere.toml"),
        (["demo", "--methods", "fi"], "Unknown method 'fi'"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_the_command_line_says_what_is_wrong_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.survives(
    "Killed and resumed",
    "Ctrl-C in a comparison",
    "goes on: log and report are whole",
)
def test_ctrl_c_leaves_a_whole_log_and_a_report_that_works(text: Path, tmp_path: Path) -> None:
    recipe = write_toml(tmp_path / "long.toml", text, steps=100_000)
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "moebalance", "train", str(recipe), "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    log = out / LOG_NAME
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if log.is_file() and log.read_text().count("\n") >= 5:
                break
            time.sleep(0.2)
        # Python drops an interrupt that falls into a finaliser; a person would press again.
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            try:
                output, _ = process.communicate(timeout=30)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Interrupted" in output
    assert read_run(log).status == "interrupted"
    done = CliRunner().invoke(app, ["report", str(out)])
    assert done.exit_code == 0, done.output


_PARENT = """
import multiprocessing, sys, time
from test_experiments import swallow

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=swallow, args=(sys.argv[1],))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def swallow(told: str) -> None:
    """A worker that says that it was interrupted, and goes on."""
    end_with_parent(grace=1.0)
    Path(told).write_text("running")
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            Path(told).write_text("interrupted")


def test_the_command_says_its_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"moebalance {mb.__version__}\n"


def test_a_misspelt_option_is_told_of_all_that_a_recipe_may_say() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'target'\?.*strength.*target, schedule"):
        build_method("phi(targt=1)")


@pytest.mark.survives(
    "Killed and resumed",
    "The process that started a comparison is killed",
    "error: its workers end too",
)
def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """One that is killed cannot tell its workers; without it they would train on, unseen."""
    script, told = tmp_path / "parent.py", tmp_path / "told"
    script.write_text(_PARENT)
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, str(script), str(told)],
        env={**os.environ, **path},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        wait_for(lambda: told.is_file() and told.read_text() == "running")
        parent.kill()
    wait_for(lambda: told.read_text() == "interrupted")
    wait_for(lambda: not alive(worker))  # even one that has swallowed the interrupt


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_fresh_run_does_not_mix_with_an_earlier_one(recipe: Recipe, tmp_path: Path) -> None:
    saving = replace(recipe, train=replace(recipe.train, save_every=2))
    before = run(saving, tmp_path).read_bytes()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run(saving, tmp_path)
    with pytest.raises(ValueError, match=r"another run: method: Together\(.*\) → PhiBalancing\("):
        run(saving, tmp_path, method="phi", resume=True)
    assert (tmp_path / LOG_NAME).read_bytes() == before


def test_wrong_types_are_named_and_brackets_survive_the_terminal(
    text: Path, tmp_path: Path
) -> None:
    recipe = write_toml(tmp_path / "r.toml", text)
    for old, new, message in (
        ("steps = 3", 'steps = "3"', "[train] steps='3': must be an integer, not str"),
        ("name = 'phi'", "name = 'phi'\nstrength = 'x'", "strength='x': must be a number"),
        ("num_experts = 8", "num_expert = 8", "[model] qwen3_moe has no configuration key"),
    ):
        changed = tmp_path / "changed.toml"
        changed.write_text(recipe.read_text().replace(old, new))
        done = CliRunner().invoke(app, ["train", str(changed), "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert message in done.output.replace("\n", " ")
