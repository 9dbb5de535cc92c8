"""What the page's script is given: loads packed and thinned, pairs of experts, sorted loads."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moebalance as mb
from families import tiny
from moebalance.lab.evaluate import evaluate, pair_lift
from moebalance.lab.text.batches import TokenDataset
from moebalance.metrics import coactivation
from moebalance.report import summarise
from moebalance.report.frames import (
    domain_frames,
    load_frames,
    mean_sorted,
    pair_frames,
    strongest_pairs,
)
from moebalance.report.loads import promised_and_delivered, relative
from moebalance.report.pack import code, pack, ratio, thinned, unpack
from moebalance.report.pictures import _ranks, discs, pictures
from moebalance.runlog import Run, read_run
from synthetic_runs import write_run


@pytest.mark.parametrize(
    "module",
    [
        importlib.import_module(f"moebalance.report.{name}")
        for name in ("pack", "loads", "watch", "methods", "parts", "draw", "embed", "frames")
    ],
)
def test_examples(module):
    assert doctest.testmod(module).failed == 0


@given(st.floats(0.01, 16000))
def test_a_ratio_comes_back_within_three_per_cent(value):
    found = ratio(code(value))
    assert found is not None
    assert found == pytest.approx(value, rel=0.03)


@given(st.floats(0, 1e30), st.floats(0, 1e30))
def test_codes_keep_the_order(one, other):
    assert (code(one) <= code(other)) if one <= other else (code(one) >= code(other))


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.binary(min_size=n, max_size=n), min_size=1)))
def test_frames_come_back(frames):
    assert unpack(pack(frames), len(frames[0])) == frames


def test_slow_changes_take_less_room():
    load = bytes(range(200))
    still = pack([load] * 50)
    assert still["delta"]
    assert len(str(still["codes"])) < 2 * len(str(pack([load])["codes"]))


def test_frames_of_several_lengths_are_refused():
    with pytest.raises(ValueError, match="several lengths"):
        pack([b"a", b"bc"])


@given(st.integers(1, 200), st.integers(1, 300))
def test_thinning_keeps_the_end_and_no_more_than_fit(count, most):
    kept = thinned(count, most)
    assert kept == sorted(set(kept))
    assert len(kept) == min(count, most)
    assert kept[-1] == count - 1


def test_load_frames_hold_snapshots_then_the_evaluation(tmp_path):
    run = read_run(write_run(tmp_path, "none", experts=8, layers=3))
    found = load_frames(run, max_cells=10_000)
    assert found is not None
    words = ["training batches"] * 3 + ["evaluation"]
    assert found["frames"] == [list(x) for x in zip((20, 40, 60, 60), words, strict=True)]
    assert found["rows"] == ["layer 0", "layer 1", "layer 2"]
    frames = unpack(found, 24)
    for frame, row in zip(frames, (*run.snapshots, run.evals[-1]), strict=True):
        expected = [code(r) for line in row["load"] for r in relative(line)]
        assert list(frame) == expected
    assert json.loads(json.dumps(found)) == found


def test_load_frames_are_thinned_to_what_fits(tmp_path):
    run = read_run(write_run(tmp_path, "phi", steps=400, experts=8, layers=2))
    found = load_frames(run, max_cells=5 * 16)
    assert found is not None
    assert [step for step, _ in found["frames"]] == [20, 120, 220, 320, 400]


def test_layers_of_several_widths_are_filled_up(tmp_path):
    path = write_run(tmp_path, "phi", snapshots=False, load=[[0.5, 0.5], [1.0]])
    found = load_frames(read_run(path), max_cells=100)
    assert found is not None
    assert unpack(found, 4) == [bytes([82, 82, 82, 0])]


def test_domain_frames_are_layers(tmp_path):
    run = read_run(write_run(tmp_path, "switch", experts=8, layers=5))
    found = domain_frames(run, run.evals[-1], max_cells=1000)
    assert found is not None
    assert found["frames"][-1] == [4, "layer 4"]
    assert found["rows"] == ["code", "prose", "dialogue", "tables"]
    last = run.evals[-1]["domain_load"][4]
    assert list(unpack(found, 32)[4]) == [code(r) for line in last for r in relative(line)]


def test_loads_by_rank_are_means_of_sorted_layers():
    assert mean_sorted([[1.0, 3.0, 0.0], [2.0, None, 1.0]]) == [2.5, 1.0, 0.0]
    assert mean_sorted([]) == []


# Pairs of experts


def test_lift_is_one_where_experts_ignore_each_other():
    generator = torch.Generator().manual_seed(0)
    experts = torch.rand(200_000, 6, generator=generator).topk(2).indices
    serves = torch.zeros(200_000, 6).scatter_(-1, experts, 1.0)
    lift = pair_lift(serves.mT @ serves)
    off = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(lift[off], torch.ones(30), atol=0.03, rtol=0)
    assert not lift.diagonal().any()


def test_lift_of_a_fixed_pair_is_that_of_the_metric_over_chance():
    experts = torch.tensor([[0, 1]] * 3 + [[2, 3]] * 3)
    serves = torch.zeros(6, 4).scatter_(-1, experts, 1.0)
    together = coactivation(experts, 4)  # 1 for the pairs, 0 otherwise; loads are all 3
    lift = pair_lift(serves.mT @ serves)
    assert lift[0].tolist()[1:] == [3.0, 0.0, 0.0]  # 1 over a chance of 1/3
    assert torch.equal(lift > 0, (together > 0).fill_diagonal_(False))


def test_an_expert_that_served_nobody_serves_with_nobody():
    lift = pair_lift(torch.tensor([[2.0, 2, 0], [2, 2, 0], [0, 0, 0]]))
    assert lift[2].tolist() == [0, 0, 0]
    assert lift[0, 1] == 1


def test_an_evaluation_logs_the_pairs_that_its_routers_chose():
    torch.manual_seed(0)
    model = tiny("qwen3_moe").eval()
    balancing = mb.attach(model, mb.LossFree(speed=0.1))
    ids = torch.randint(0, model.config.vocab_size, (4, 16))
    found = evaluate(
        model, balancing, TokenDataset(ids, torch.zeros(4, dtype=torch.long), ("a",)), batch_size=2
    )
    assert found["coactivation_layers"] == list(range(len(balancing.layers)))
    for lift, name in zip(found["coactivation"], balancing.layers, strict=True):
        chosen: list[torch.Tensor] = []
        router = model.get_submodule(name)
        handle = router.register_forward_hook(
            lambda _, __, output, chosen=chosen: chosen.append(output[2])
        )
        model(input_ids=ids)
        handle.remove()
        experts = chosen[0].tolist()
        num_experts = balancing.layers[name].num_experts
        counts = [sum(e in token for token in experts) for e in range(num_experts)]
        pairs = list(combinations(range(num_experts), 2))
        both = [sum(i in token and j in token for token in experts) for i, j in pairs]
        chance = [counts[i] * counts[j] for i, j in pairs]
        scale = sum(both) / sum(chance)
        expected = [b / (c * scale) if c else 0.0 for b, c in zip(both, chance, strict=True)]
        assert lift == pytest.approx(expected, rel=6e-3)


def logged(layers: object = None, lift: object = None) -> dict[str, object]:
    row = {"kind": "eval", "step": 1, "coactivation_layers": layers, "coactivation": lift}
    return {key: value for key, value in row.items() if value is not None}


def test_pairs_become_symmetric_frames(tmp_path):
    run = read_run(write_run(tmp_path, "phi", layers=3))
    row = logged(layers=[0, 2], lift=[[1.0, 2.0, None], [0.0, 0.5, 4.0]])
    found = pair_frames(run, row, max_cells=100)
    assert found is not None
    assert found["frames"] == [[0, "layer 0"], [2, "layer 2"]]
    first, last = (list(frame) for frame in unpack(found, 9))
    assert first == [0, 82, 94, 82, 0, 0, 94, 0, 0]
    assert last == [0, 1, 70, 1, 0, 106, 70, 106, 0]
    # Expert 2 serves with nobody: empty, which is more than never with these.
    idle = pair_frames(run, logged(layers=[0], lift=[[1.0, 0.0, 0.0]]), max_cells=100)
    assert idle is not None
    assert list(unpack(idle, 9)[0]) == [0, 82, 0, 82, 0, 0, 0, 0, 0]
    assert strongest_pairs(row)[:2] == ["1 with 2: 4.0×", "0 with 2: 0.5×"]


@pytest.mark.parametrize(
    "pairs",
    [
        {},
        {"layers": [0]},
        {"layers": [0], "lift": []},
        {"layers": [0], "lift": [[]]},
        {"layers": [0], "lift": [[1.0, 2.0]]},
        {"layers": ["a"], "lift": [[1.0]]},
        {"layers": [0, 1], "lift": [[1.0], [1.0] * 3]},
        {"layers": 3, "lift": "much"},
    ],
)
def test_pairs_that_cannot_be_read_are_left_out(pairs):
    run = Run(Path("x"), {"method": "phi"})
    assert pair_frames(run, logged(**pairs), max_cells=100) is None
    assert strongest_pairs(logged(**pairs)) == []


# The figures of load


def test_the_line_by_rank_stands_where_its_axis_says(tmp_path):
    write_run(tmp_path, "phi", load=[[0.5, 0.25, 0.25, 0.0]], layers=1)
    run = read_run(tmp_path)
    svg = ET.fromstring(_ranks(summarise([run])[0].methods, {}) or "")
    low, high, start, end = map(float, svg.get("data-y", "").split())
    line = svg.find(".//path[@class='line']")
    assert line is not None
    heights = [float(p.split()[1]) for p in line.get("d", "")[1:].split("L")]
    assert len(heights) == 4
    values = [low + (y - start) / (end - start) * (high - low) for y in heights]
    assert values == pytest.approx([2.0, 1.0, 1.0, 0.0], abs=0.01)


def test_discs_count_every_expert_once(tmp_path):
    soft = [[0.25] * 4, [0.25] * 4]
    write_run(tmp_path, "phi", load=[[0.5, 0.25, 0.25, 0.0], [0.25] * 4], soft=soft)
    svg = ET.fromstring(discs(promised_and_delivered(read_run(tmp_path)), "#112233", {}))
    found = {}
    for disc in svg.findall(".//path[@class='disc']"):
        numbers = [float(x) for x in re.findall(r"-?[\d.]+", disc.get("d", ""))]
        found[disc.findtext("title")] = max(numbers[::2]) - min(numbers[::2])  # how wide it is
    assert set(found) == {
        "6 of 8 experts: promised about 1×, got about 1×",
        "1 of 8 experts: promised about 1×, got about 2×",
        "1 of 8 experts: promised about 1×, got nothing: dead",
    }
    sizes = sorted(found.values())
    assert sizes[2] / sizes[0] == pytest.approx(math.sqrt(6), rel=0.05)


def test_no_discs_without_soft_loads(tmp_path):
    write_run(tmp_path, "phi", soft=None)
    assert promised_and_delivered(read_run(tmp_path)) == []
    (section,) = summarise([read_run(tmp_path)])
    assert pictures(section, {}, still_cells=99, packed_cells=99)["soft_hard"] == []
