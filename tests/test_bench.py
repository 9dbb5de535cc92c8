"""The benchmark compares what it says it compares, and reports what it measured."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from evidence.gpu_page import write_gpu_page
from moebalance import NoBalancing, PhiBalancing, SwitchLoss
from moebalance.kernels.tiling import tile
from moebalance.lab.bench import RULES, Case, StepCase, measure_routers, measure_steps, write_page
from moebalance.lab.bench import timing as clock
from moebalance.lab.bench.step import PENALTY
from moebalance.lab.bench.timing import BARE, NULL, interleaved
from moebalance.lab.bench.variants import STRENGTH, Attached, BareRouter, Ours, others
from moebalance.lab.cli import app

EXPERTS, TOP_K = 16, 4
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"

every_rule = pytest.mark.parametrize("rule", RULES)


def gradient(variant, logits: torch.Tensor) -> torch.Tensor:
    weights, term = variant(logits)
    loss = weights.square().mean()  # the same in whichever order the experts are named
    (found,) = torch.autograd.grad(loss if term is None else loss + term, logits)
    return found


def logits(tokens: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, EXPERTS, generator=generator).requires_grad_()


# --- what is compared -------------------------------------------------------------------------


@every_rule
def test_all_variants_route_alike(rule):
    z = logits()
    expected, _ = BareRouter(rule, TOP_K)(z)
    variants = {
        "unordered": BareRouter(rule, TOP_K, ordered=False),
        "ours": Ours(PhiBalancing(), EXPERTS, TOP_K, rule),
        "attached": Attached(PhiBalancing(), EXPERTS, TOP_K, rule),
        **others(EXPERTS, TOP_K, rule),
    }
    for name, variant in variants.items():
        weights, _ = variant(z)
        weights = weights.sort(dim=-1, descending=True).values
        torch.testing.assert_close(weights, expected, msg=name)


@every_rule
def test_the_restated_switch_losses_have_the_gradient_of_ours(rule):
    z = logits()
    ours = gradient(Ours(SwitchLoss(STRENGTH), EXPERTS, TOP_K, rule), z)
    bare = gradient(BareRouter(rule, TOP_K), z)
    assert (ours - bare).abs().max() > 1e-6
    theirs = others(EXPERTS, TOP_K, rule)
    names = ["Switch, leanest (restated)"]
    if not rule.startswith("sigmoid"):  # those write the load against the plain sigmoid
        names.append("Switch, one-hot (restated)")
    for name in names:
        torch.testing.assert_close(gradient(theirs[name], z), ours, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("rule", [r for r in RULES if not r.startswith("sigmoid")])
def test_transformers_function_is_ours_times_the_number_of_chosen_experts(rule):
    z = logits()
    bare = gradient(BareRouter(rule, TOP_K), z)
    ours = gradient(Ours(SwitchLoss(STRENGTH), EXPERTS, TOP_K, rule), z) - bare
    theirs = gradient(others(EXPERTS, TOP_K, rule)["Transformers' function"], z) - bare
    torch.testing.assert_close(theirs, TOP_K * ours, rtol=1e-3, atol=1e-7)


# --- how it is measured -----------------------------------------------------------------------


def test_ratios_are_taken_within_a_round(monkeypatch):
    """A machine that slows down tenfold in the middle changes no ratio."""
    times = {BARE: 1.0, "slow": 3.0}
    rounds = dict.fromkeys(times, 0)

    def scripted(call, repeats):
        name = call()
        rounds[name] += 1
        return times[name] * (10 if rounds[name] > 5 else 1)

    monkeypatch.setattr(clock, "_host_time_s", scripted)
    found = interleaved({name: lambda name=name: name for name in times}, rounds=9)
    assert (found["slow"].ratio, found["slow"].low, found["slow"].high) == (3, 3, 3)
    assert found[BARE].ratio == 1
    assert set(rounds.values()) == {11}  # two rounds to warm up


def test_the_null_control_differs_from_the_bare_router_in_nothing_that_is_counted():
    (row,) = measure_routers([Case(64, EXPERTS, TOP_K)], {"none": NoBalancing()}, rounds=2)
    null, ours = row["variants"][NULL], row["variants"]["none"]
    assert null["bytes"] == 0
    assert null["kernels"] == [0, 0]
    assert ours["bytes"] > 0
    assert ours["kept"] == null["kept"]


def test_a_step_of_a_model_is_timed_with_and_without_a_method():
    case = StepCase(tokens=16, experts=4, top_k=2, layers=1, hidden=16, length=8)
    (row,) = measure_steps([case], {"phi": PhiBalancing()}, rounds=2)
    assert set(row["variants"]) == {BARE, NULL, "phi", PENALTY}
    assert all(v["time_ms"] > 0 for v in row["variants"].values())
    part = row["parts"]["phi"]
    assert part["added_ms"] > abs(part["null_ms"])
    assert part["end_ms"] > 0


# --- what is reported -------------------------------------------------------------------------


def test_the_command_writes_json_a_page_and_a_plot(tmp_path):
    out = tmp_path / "deep" / "cost"
    arguments = ["--tokens", "64", "--sizes", "16:4", "--rules", "softmax,sigmoid", "--rounds", "2"]
    done = CliRunner().invoke(app, ["bench", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    results = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["rule"] for row in results["routers"]] == ["softmax", "sigmoid, normalised"]
    assert {"device", "torch", "commit", "threads"} <= set(results["machine"])
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    plot = out.with_suffix(".svg").read_text(encoding="utf-8")
    text = "".join(ElementTree.fromstring(plot).itertext())
    for row in results["routers"]:
        for name, found in row["variants"].items():
            assert f"| {name} | {found['ratio']:.2f} |" in page
            assert name in text
    assert (
        write_page(results, tmp_path / "again.md", plot=out.with_suffix(".svg").name).read_text(
            encoding="utf-8"
        )
        == page
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sizes", "64"], "whole numbers"),
        (["--tokens", "many"], "whole numbers"),
        (["--tokens", "8,0"], "at least 1 token"),
        (["--tokens", "-1"], "at least 1 token"),
        (["--device", "tpu"], "must be cpu, cuda"),
        (["--device", "cuda:x"], "must be cpu, cuda"),
        (["--rules", "tanh"], "is no rule"),
        (["--methods", "fhi"], "phi"),
    ],
)
def test_a_word_that_means_nothing_is_refused_with_what_does(arguments, reason):
    done = CliRunner().invoke(app, ["bench", "--rounds", "2", *arguments])
    assert done.exit_code == 2
    assert reason in done.output


def gpu_script():
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def rehearsed(part: str):
    return gpu_script().PARTS[part]()


def test_the_script_for_a_gpu_is_rehearsed(tmp_path, interpreted):
    """On a processor, by Triton's interpreter: everything but the numbers."""
    out = tmp_path / "gpu.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(out), "silent"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["silent"] == {"skipped": "no CUDA device"}
    # The script gives each part a process, which imports torch again.
    found |= {part: interpreted(rehearsed, part) for part in ("correct", "on", "step")}
    found = json.loads(json.dumps(found))
    found["targets"] = gpu_script().targets(found)
    assert len(found["correct"]["rows"]) == 14
    for row in found["correct"]["rows"]:
        exact = "float32" in row["case"]
        assert row["sums"] < 1e-5
        assert row["gradient"] < (1e-5 if exact else 1e-2)
        assert row["attached sums"] < 1e-5
        assert row["attached gradient"] < (1e-5 if exact else 1e-2)
    assert set(found["step"][0]["variants"]) == {BARE, NULL, "φ", PENALTY}
    assert {"device", "commit", "torch", "triton", "cuda"} <= set(found["machine"])
    reached = {line["what"]: line for line in found["targets"]}
    (on, whole) = reached.values()  # of the parts that ran
    assert on["all"] == {r["case"]: round(r["variants"]["φ"]["ratio"], 4) for r in found["on"]}
    assert on["worst"] == max(on["all"].values())
    assert whole["worst"] == round(found["step"][0]["variants"]["φ"]["interval"][1], 4)


def test_the_page_of_a_gpu_shows_every_part_that_ran_and_none_that_failed(tmp_path):
    found = json.loads((ROOT / "benchmarks/results/h200.json").read_text(encoding="utf-8"))
    whole = {"case": "4 layers", "variants": found["on"][0]["variants"]}
    found |= {"step": [whole], "speed": {"failed": "stopped after 50 s"}}
    found["router"][0]["variants"]["φ"]["device"] = None
    page = write_gpu_page(found, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## A whole training step" in page
    assert "| 4 layers |" in page
    assert "## Bandwidth" not in page
    assert "| φ | – | – | 647 | 3.01 |" in page


def test_the_layouts_that_are_tried_are_those_of_the_programs_and_others():
    spec = importlib.util.spec_from_file_location("tiles", SCRIPT.with_name("tiles.py"))
    tiles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiles)
    for program, experts, dtype in product(tiles.PROGRAMS, tiles.SIZES, tiles.DTYPES):
        logits, sums = torch.empty(4, experts, dtype=dtype), program in ("choose", "count")
        usual, *others = (layout.tile(logits, sums=sums) for layout in tiles.layouts(program))
        assert usual == tile(logits, sums=sums)
        assert any(other != usual for other in others)
        for other in others:
            block, columns = other.sizes.block, other.sizes.chunks * other.sizes.width
            assert block & (block - 1) == 0  # Triton takes powers of two
            assert block * columns >= 32 * other.warps


def test_the_script_for_a_gpu_ends_within_nine_minutes_and_judges_all_its_parts():
    script = gpu_script()
    assert set(script.LIMIT_S) == set(script.PARTS)
    assert sum(script.LIMIT_S.values()) <= 9 * 60 - 10

    def row(case, **ratios):
        interval = [0.9, 1.3]
        variants = {
            name: {"ratio": ratio, "interval": interval, "device": {"ratio": ratio - 0.5}}
            for name, ratio in ratios.items()
        }
        return {"case": case, "variants": variants, "pull_back": {"tb_per_s": ratios["φ"]}}

    theirs = {"Transformers' function": 3.5}
    rows = [
        row("a", φ=1.1, **{"φ, attached": 1.6}, **theirs),
        row("b", φ=1.4, **{"φ, attached": 1.9}, **theirs),
        row("sigmoid", φ=1.2, **{"φ, attached": 2.5}),
    ]
    rows[0]["variants"]["Transformers' function"]["device"] = None  # it could not be captured
    results = dict.fromkeys(("router", "on", "speed", "step"), rows)
    found = {line["what"]: (line["worst"], line["at"]) for line in script.targets(results)}
    assert found == {
        "φ over counting alone, fused": (1.4, "b"),
        "fused φ over the bare router, on the device": (0.9, "b"),
        "fused φ over the bare router, with the host that starts it": (1.4, "b"),
        "what Transformers' function adds over φ attached": (5.0, "b"),
        "backward, TB/s": (1.1, "a"),
        "a whole step with φ, upper end of its 95 % interval": (1.3, "a"),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused():
    done = CliRunner().invoke(app, ["bench", "--device", "cuda"])
    assert done.exit_code == 2
    assert "no CUDA device" in done.output


def committed_costs() -> dict:
    return json.loads((ROOT / "benchmarks/results/cost.json").read_text(encoding="utf-8"))


def test_the_page_in_the_documentation_is_that_of_the_committed_results(tmp_path):
    results = committed_costs()
    page = write_page(results, tmp_path / "cost.md", plot="cost.svg")
    for file in (page, tmp_path / "cost.svg"):
        committed = (ROOT / "docs" / file.name).read_text(encoding="utf-8")
        assert committed == file.read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks/results/h200.json").read_text(encoding="utf-8"))
    page = write_gpu_page(found, tmp_path / "cost_gpu.md")
    committed = (ROOT / "docs" / page.name).read_text(encoding="utf-8")
    assert committed == page.read_text(encoding="utf-8")
    assert found["targets"] == gpu_script().targets(found)
    tutorial = (ROOT / "docs/tutorials/pretrainer.md").read_text(encoding="utf-8")
    rows = [row["variants"] for row in results["routers"] if row["rule"] == "softmax"]
    names = {
        "bare again (null control)": NULL,
        "bare, choice in no order": "bare, choice in no order",
        "counting only": "none",
        "φ-balancing, `BalancedRouter`": "phi",
        "φ-balancing, attached to another's router": "phi, attached",
        "leanest Switch loss": "Switch, leanest (restated)",
        "torchtitan's router, loss-free": "torchtitan's router",
        "Megatron-Core's loss function": "Megatron-Core's function",
        "Transformers' loss function": "Transformers' function",
    }
    for title, name in names.items():
        cells = " | ".join(f"{row[name]['ratio']:.2f}" for row in rows)
        assert f"| {title} | {cells} |" in tutorial
    words = " ".join(tutorial.split())
    attached = [row["phi+loss-free(scale='nats'), attached"]["ratio"] for row in rows]
    said = "The recommended method, attached, takes {:.2f}, {:.2f} and {:.2f}:".format(*attached)
    assert said in words
    for adder, said, without in (
        ("phi", "φ adds", "bare, choice in no order"),
        ("Switch, leanest (restated)", "sorts, adds", "bare"),
    ):
        added = [row[adder]["ratio"] - row[without]["ratio"] for row in rows]
        assert said + " {:.2f}, {:.2f} and {:.2f}".format(*added) in words


def test_the_page_has_a_reason_for_everything_of_ours_that_takes_much_longer():
    results = committed_costs()
    slow = [
        name
        for row in results["routers"]
        for name, found in row["variants"].items()
        if found["ratio"] > 1.15 and not re.search(r"restated|function|router$|^bare", name)
    ]
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    part = page.partition("and why")[2].partition("## ")[0]
    reasons = re.findall(r"^\| ([A-Z][^|]+) \| (\d+) \|", part, re.MULTILINE)
    assert sum(int(number) for _, number in reasons) == len(slow) > 0
    assert any("histogram" in reason for reason, _ in reasons)
