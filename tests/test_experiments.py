"""The main job end to end, small: train, compare, resume."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moebalance as mb
from experiments import MODEL, small, write_text
from moebalance import metrics
from moebalance.lab.checkpoints import last_whole_checkpoint
from moebalance.lab.compare import compare, is_complete, plan
from moebalance.lab.evaluate import evaluate
from moebalance.lab.inputs import build_model
from moebalance.lab.recipe import Recipe
from moebalance.lab.text.batches import TokenDataset
from moebalance.lab.train import train_run
from moebalance.runlog import LOG_NAME, read_run

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def recipe(text: Path) -> Recipe:
    return small(text)


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


@pytest.mark.usefixtures("forked")
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
@pytest.mark.usefixtures("forked")
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


def test_a_fresh_run_does_not_mix_with_an_earlier_one(recipe: Recipe, tmp_path: Path) -> None:
    saving = replace(recipe, train=replace(recipe.train, save_every=2))
    before = run(saving, tmp_path).read_bytes()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        run(saving, tmp_path)
    with pytest.raises(ValueError, match=r"another run: method: Together\(.*\) → PhiBalancing\("):
        run(saving, tmp_path, method="phi", resume=True)
    assert (tmp_path / LOG_NAME).read_bytes() == before
