"""The numbers of the report against scipy and the run logs, and the sentence they are put in."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from scipy import stats

from moebalance.report import summarise, summary_rows, write_markdown
from moebalance.report.methods import LOOKS
from moebalance.report.summary import METRICS
from moebalance.report.verdict import paired
from moebalance.runlog import Run, archive, find_runs, read_run
from synthetic_runs import LIKE_PHI, METHODS, NONE, PHI, made, sentence, write_run

# The rows


def test_rows_are_means_and_deviations_over_seeds(runs):
    by_hand = [
        run.evals[-1] for run in runs if run.method == "phi" and run.batching == "one-domain"
    ]
    (row,) = [
        r for r in summary_rows(runs) if (r["method"], r["batching"]) == ("phi", "one-domain")
    ]
    for metric in METRICS:
        values = [e[metric.key] for e in by_hand]
        key = "val_loss" if metric.key == "loss" else metric.key
        assert row[key] == pytest.approx(statistics.mean(values), rel=1e-12)
        assert row[f"{key}_sd"] == pytest.approx(statistics.stdev(values), abs=1e-12)
    assert (row["seeds"], row["label"], row["partial"]) == (3, "φ-balancing", False)


@pytest.fixture(scope="module")
def turns(runs):
    """The same runs, as if they had taken turns on one machine."""
    return [dataclasses.replace(r, header={**r.header, "interleaved": True}) for r in runs]


def test_runs_that_did_not_take_turns_have_no_step_time(runs, tmp_path):
    rows = summary_rows(runs)
    assert {row[key] for row in rows for key in ("step_time_s", "step_time_ratio")} == {None}
    assert "Step time" not in write_markdown(runs, tmp_path / "t.md", "T").read_text("utf-8")


def test_step_time_is_compared_with_no_balancing_seed_by_seed(turns):
    runs = turns

    def times(method: str) -> dict[int | None, float]:
        chosen = [r for r in runs if r.method == method and r.batching == "mixed"]
        return {r.seed: statistics.median(row["step_time_s"] for row in r.steps) for r in chosen}

    rows = {r["method"]: r for r in summary_rows(runs) if r["batching"] == "mixed"}
    assert rows["none"]["step_time_ratio"] == 1.0
    for method in METHODS:
        found, bare = times(method), times("none")
        ratio = statistics.median(found[seed] / bare[seed] for seed in found)
        assert rows[method]["step_time_s"] == pytest.approx(statistics.median(found.values()))
        assert rows[method]["step_time_ratio"] == pytest.approx(ratio)


def test_a_seed_that_a_busy_machine_slowed_down_does_not_change_what_a_method_costs(turns):
    runs = turns

    def slowed(run):
        if run.seed != 0:
            return run
        steps = [{**row, "step_time_s": 5 * row["step_time_s"]} for row in run.steps]
        return dataclasses.replace(run, steps=tuple(steps))

    before, after = (
        [row["step_time_ratio"] for row in summary_rows(r)] for r in (runs, [*map(slowed, runs)])
    )
    assert after == pytest.approx(before)


def test_seeds_without_a_run_to_compare_with_are_compared_as_they_are(turns):
    kept = [r for r in turns if r.batching == "mixed"]
    kept = [r for r in kept if (r.method, r.seed) in {("none", 0), ("phi", 1)}]
    (phi,) = [row for row in summary_rows(kept) if row["method"] == "phi"]
    time = {r.method: r.step_time_s for r in kept}
    assert phi["step_time_ratio"] == pytest.approx(time["phi"] / time["none"])


def test_rows_come_in_the_order_of_the_page(runs):
    rows = summary_rows(runs)
    assert [r["batching"] for r in rows] == ["mixed"] * 12 + ["one-domain"] * 12
    shown = {run.method for run in runs}
    assert len(shown) == 12
    assert [r["method"] for r in rows[:12]] == [name for name in LOOKS if name in shown]


def test_rows_are_plain_values(runs):
    assert json.loads(json.dumps(summary_rows(runs))) == summary_rows(runs)


def test_an_archived_run_reports_the_same_table(turns, tmp_path):
    runs = turns
    copies = [read_run(archive(run, tmp_path / "kept" / str(i))) for i, run in enumerate(runs)]
    assert summary_rows(copies) == summary_rows(runs)
    assert not any(copy.steps for copy in copies)
    assert sum(c.path.stat().st_size for c in copies) < sum(r.path.stat().st_size for r in runs) / 2


def test_markdown_holds_the_verdict_and_a_row_for_each_method(runs, tmp_path):
    text = write_markdown(runs, tmp_path / "docs" / "t.md", "Title").read_text(encoding="utf-8")
    for section in summarise(runs):
        assert section.verdict in text
    rows = [line for line in text.splitlines() if line.startswith("| φ-balancing |")]
    assert len(rows) == len(summarise(runs))
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {12}


def test_markdown_has_a_column_of_step_times_where_there_are_any(turns, tmp_path):
    text = write_markdown(turns, tmp_path / "t.md", "Title").read_text(encoding="utf-8")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {13}


# Paired differences


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_a_paired_difference_is_scipys(n):
    ours = {seed: 1.0 + math.sin(seed) / 50 for seed in range(n)}
    theirs = {seed: 1.01 + math.cos(3 * seed) / 50 for seed in range(n)}
    found = paired(ours, theirs)
    test = stats.ttest_rel(list(ours.values()), list(theirs.values()))
    low, high = test.confidence_interval(0.95)
    assert found is not None
    assert found.half is not None
    assert found.mean == pytest.approx((low + high) / 2)
    assert found.half == pytest.approx((high - low) / 2, rel=1e-9)
    assert (found.sign == 0) == (test.pvalue > 0.05)


def test_pairing_uses_the_seeds_both_have():
    assert paired({0: 1.0}, {1: 1.0}) is None
    found = paired({0: 1.0, 2: 9.0}, {0: 3.0, 1: 7.0})
    assert found is not None
    assert (found.mean, found.half, found.n, found.sign) == (-2.0, None, 1, None)


# The sentence


def test_verdict_when_phi_is_better():
    text = sentence(made(phi=PHI, none=NONE, switch=LIKE_PHI))
    assert text.startswith(
        "φ-balancing cut MaxVio from 4.30 ± 0.20 (no balancing) to 0.85 ± 0.05 and lowered "
        "validation loss by 0.031 nats/token (95 % interval 0.029 to 0.033) over 3 paired seeds; "
    )
    assert "its loss and the loss of Switch loss differ by no more than seed noise" in text
    assert text.endswith("Switch loss has the lowest MaxVio, 0.25 ± 0.01.")
    assert text.count(".") - len(re.findall(r"\d\.\d", text)) == 1  # one sentence


def test_verdict_when_phi_is_worse():
    text = sentence(
        made(phi={**NONE, "loss": [1.70, 1.69, 1.71]}, none={**PHI, "loss": NONE["loss"]})
    )
    assert "raised MaxVio from 0.85 ± 0.05 (no balancing) to 4.30 ± 0.20" in text
    assert "and raised validation loss by 0.065 nats/token" in text


def test_verdict_when_balance_costs_loss():
    text = sentence(made(phi={**PHI, "loss": [1.70, 1.69, 1.71]}, none=NONE))
    assert "cut MaxVio" in text
    assert ", but raised validation loss by 0.065 nats/token" in text


def test_verdict_within_noise():
    noisy = {"loss": [1.60, 1.66, 1.64], "maxvio": [4.6, 4.0, 4.3]}
    text = sentence(made(phi=noisy, none=NONE))
    said = "shows MaxVio 4.30 ± 0.30 against 4.30 ± 0.20 with no balancing"
    assert f"{said} (3 seeds cannot tell this from noise) and left" in text
    assert "left validation loss within seed noise (change −0.002, 95 % interval −0.0" in text
    assert "over 3 paired seeds" in text


def test_verdict_with_one_seed_claims_nothing():
    text = sentence(
        made(
            phi={"loss": [1.60], "maxvio": [0.8]},
            switch={"loss": [1.61], "maxvio": [0.9]},
            none={"loss": [1.64], "maxvio": [4.3]},
        )
    )
    assert "MaxVio 0.80 against 4.30 and validation loss 1.600 against 1.640" in text
    assert "with one shared seed the noise is unknown" in text
    assert "no order among the methods can be told" in text
    assert "cut" not in text
    assert "±" not in text


def test_verdict_without_a_shared_seed():
    runs = made(phi=PHI, none=NONE)
    for run in runs[3:]:
        run.header["seed"] += 10  # type: ignore[index]
    assert "share no seed, so their difference cannot be told from noise" in sentence(runs)


def test_verdict_without_a_baseline():
    text = sentence(made(phi=PHI, switch=LIKE_PHI))
    assert text.startswith("φ-balancing shows MaxVio 0.85 ± 0.05 and validation loss 1.604 ± 0.005")
    assert "no run without balancing is here" in text


def test_verdict_without_phi_speaks_of_what_is_there():
    assert sentence(made(switch=LIKE_PHI, quantile=PHI, none=NONE)) == (
        "Switch loss has the lowest MaxVio, 0.25 ± 0.01, against 4.30 ± 0.20 with no balancing; "
        "Switch loss (1.604 ± 0.003) and Quantile balancing (1.604 ± 0.005) have the lowest "
        "validation loss, within seed noise of one another (95 % each, uncorrected for 2 "
        "comparisons)."
    )
    assert sentence(made(switch=LIKE_PHI, none=NONE)).startswith(
        "Switch loss cut MaxVio from 4.30 ± 0.20 (no balancing) to 0.25 ± 0.01 and lowered "
        "validation loss by 0.031 nats/token"
    )


ONE, TWO = ({"loss": [1.6, 1.62][:n], "maxvio": [0.8, 0.84][:n]} for n in (1, 2))
BARE = Run(Path("bare/log.jsonl"), {"kind": "header", "format": 1, "method": "phi", "seed": 0})


def test_runs_that_were_never_evaluated_are_said_to_be_so():
    assert sentence([BARE]) == "No run was evaluated, so there is nothing to compare yet."
    (run,) = made(phi={"loss": [1.6]})
    cut = dataclasses.replace(run, header={**run.header, "steps": 9})
    assert sentence([cut]).startswith("No run reached its last evaluation")


NOISE = "; with one seed the noise between seeds is unknown."


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (
            {"switch": ONE},
            "Switch loss shows MaxVio 0.80 and validation loss 1.600; no run without balancing is "
            "here, so what balancing itself gains cannot be said" + NOISE,
        ),
        (
            {"none": TWO},
            "No balancing shows MaxVio 0.82 ± 0.03 and validation loss 1.610 ± 0.014; there is "
            "nothing here to compare it with.",
        ),
        (
            {"monitor": {"maxvio": [1.4]}},
            "Monitor shows MaxVio 1.40; there is nothing here to compare it with" + NOISE,
        ),
        (
            {"switch": ONE, "none": ONE},
            "Switch loss shows MaxVio 0.80 against 0.80 and validation loss 1.600 against 1.600 "
            "without balancing; with one shared seed the noise is unknown.",
        ),
        (
            {"phi": ONE, "switch": ONE, "none": ONE},
            "φ-balancing shows MaxVio 0.80 against 0.80 and validation loss 1.600 against 1.600 "
            "without balancing; with one shared seed the noise is unknown, so no order among the "
            "methods can be told.",
        ),
        (
            {"switch": ONE, "quantile": ONE},
            "With one shared seed the noise is unknown, so no order among the methods can be told.",
        ),
        (
            {"switch": TWO, "quantile": {"maxvio": [0.8, 0.84]}},
            "Switch loss (0.82 ± 0.03) and Quantile balancing (0.82 ± 0.03) are within seed noise "
            "of one another in MaxVio.",
        ),
        (
            {"phi": {"maxvio": [0.8, 0.84]}, "none": {"maxvio": [2.8, 2.84]}},
            "φ-balancing cut MaxVio from 2.82 ± 0.03 (no balancing) to 0.82 ± 0.03 over 2 paired "
            "seeds; there is no validation loss to compare.",
        ),
        (
            {"phi": {"loss": [1.6, 1.62]}, "none": {"loss": [1.7, 1.71]}},
            "φ-balancing lowered validation loss by 0.095 nats/token (95 % interval 0.031 to "
            "0.159) over 2 paired seeds; there is no MaxVio to compare.",
        ),
    ],
)
def test_few_runs_make_a_sentence_that_says_what_they_lack(runs, expected):
    assert sentence(made(**runs)) == expected


def test_the_recommended_method_leads_where_it_was_run():
    text = sentence(made(phi=LIKE_PHI, **{"phi+loss-free": PHI}, none=NONE))
    assert text.startswith("φ + loss-free cut MaxVio from 4.30 ± 0.20 (no balancing)")
    assert "φ-balancing has the lowest MaxVio, 0.25" in text


def test_verdict_names_the_methods_that_differ():
    worse, better = [1.65, 1.64, 1.643], [1.55, 1.54, 1.545]
    text = sentence(
        made(
            phi=PHI,
            switch={"loss": worse, "maxvio": [1.0, 1.1, 1.2]},
            sinkhorn={"loss": better, "maxvio": [1.0, 1.1, 1.2]},
            quantile=LIKE_PHI,
            none=NONE,
        )
    )
    assert re.search(
        r"lower than with Switch loss, higher than with Sinkhorn and within seed noise of "
        r"Quantile balancing \(95 % each, uncorrected for 3 comparisons\)",
        text,
    )


def test_the_lowest_is_named_beyond_noise_only():
    near = {"loss": [1.605, 1.603, 1.6], "maxvio": [0.84, 0.91, 0.78]}
    assert "lowest MaxVio" not in sentence(made(phi=PHI, switch=near, none=NONE))
    without = sentence(made(quantile=PHI, switch=near, none=NONE))
    assert "has the lowest MaxVio" not in without
    assert "within seed noise of one another" in without
    single = {"loss": [1.6], "maxvio": [0.8]}, {"loss": [1.61], "maxvio": [0.4]}
    assert "lowest MaxVio" not in sentence(made(phi=single[0], switch=single[1]))
    assert "lowest" not in sentence(made(quantile=single[0], switch=single[1]))


def test_verdict_with_lost_numbers_stays_careful():
    text = sentence(made(phi={"loss": [1.6, None, None], "maxvio": [0.8, 0.9, 0.8]}, none=NONE))
    assert "cut MaxVio" in text
    assert "lowered validation loss by 0.040 nats/token (noise unknown)" in text
    text = sentence(made(phi={"loss": [None] * 3, "maxvio": [None] * 3}, none=NONE))
    assert text.startswith("No balancing shows MaxVio 4.30")


def test_a_sweep_is_told_apart_and_its_best_speaks(tmp_path):
    for strength, shift in (("0.001", 0.0), ("0.01", -0.02)):
        for seed in (0, 1):
            write_run(
                tmp_path / f"{strength}-{seed}",
                "phi",
                seed=seed,
                header={
                    "method_repr": f"PhiBalancing(NegativeEntropy(a=1, b=2), strength={strength})"
                },
                loss=1.6 + shift + seed / 100,
                maxvio=0.9 if shift else 0.4,
            )
    (section,) = summarise(find_runs(tmp_path))
    labels = [m.label for m in section.methods]
    assert labels == ["φ-balancing · strength=0.001", "φ-balancing · strength=0.01"]
    assert "strength=0.01 (the lowest validation loss of its 2 settings)" in section.verdict
    assert "its loss is lower than with φ-balancing · strength=0.001" in section.verdict
    assert "φ-balancing · strength=0.001 has the lowest MaxVio, 0.40" in section.verdict


def test_a_seed_that_was_run_twice_is_one_seed(runs):
    twice = [r for r in runs if (r.batching, r.method) == ("mixed", "phi")]
    (row,) = summary_rows([*twice, *twice])
    assert row["seeds"] == len({r.seed for r in twice}) == 3
