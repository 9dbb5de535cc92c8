"""Numbers and names in the README, and in the tutorials, are those of the library and its results.

The code that they show: test_documents.py.
"""

import json
import re

import moebalance as mb
from documents import ROOT, table
from english import count, prose
from moebalance.report import summarise
from moebalance.runlog import find_runs


def words(page: str) -> str:
    """The text of a page on one line."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


README = (ROOT / "README.md").read_text(encoding="utf-8")
FINE_TUNER, PRETRAINER = (words(f"docs/tutorials/{n}.md") for n in ("fine_tuner", "pretrainer"))


def test_methods_in_the_readme_are_the_methods_there_are() -> None:
    from moebalance.words.methods import method_classes

    table = dict(re.findall(r"^\| `(\w+)` \| `([\w-]+)` \|", README, flags=re.MULTILINE))
    assert table == {kind.__name__: word for word, kind in method_classes().items()}


def test_the_readme_is_short() -> None:
    number, _ = count([prose(ROOT / "README.md")])
    assert number <= 1300


def test_the_resuming_figure_in_the_tutorial_is_that_of_the_families() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    without, families = re.search(r"\*without experts\*, in (\d+) of (\d+) families", text).groups()
    assert f"In {without} of {families} families" in FINE_TUNER


def test_the_layout_figure_in_the_tutorial_is_the_one_measured_of_phi() -> None:
    text = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| phi-negative-entropy |"))
    differences = [float(cell) for cell in row.split("|")[3:-2] if cell.strip() != "="]
    assert f"by up to {max(differences)} of its size" in PRETRAINER
    assert mb.PhiBalancing().traits.coupling == "batch"
    assert mb.PhiBalancing(peek=False).traits.coupling == "token"


def test_what_is_said_of_the_figure_is_what_the_demo_measured() -> None:
    rows = {row["Method"]: row for row in table(ROOT / "docs/demo.md", "mixed-micro-batches")}

    def mean(method: str, column: str) -> str:
        return rows[method][column].partition(" ±")[0]

    said = " ".join(README.split())
    assert f"Without balancing MaxVio is {mean('No balancing', 'MaxVio global')}, and" in said
    assert f"{mean('No balancing', 'Dead experts')} of 64 experts are" in said
    assert {mean(name, "Dead experts") for name in rows if name != "No balancing"} == {"0.0"}
    assert "With each of the three methods none is." in said
    assert f"method brings MaxVio to {mean('φ + loss-free', 'MaxVio global')}." in said
    assert f"alone brings MaxVio to {mean('φ-balancing', 'MaxVio global')}." in said
    found = " ".join((ROOT / "docs/demo.md").read_text(encoding="utf-8").split())
    assert "its loss is within seed noise of no balancing" in said
    assert "to 0.089 ± 0.005 and left validation loss within seed noise" in found


def test_the_comparison_in_the_readme_is_that_of_the_evidence() -> None:
    from evidence.study import read

    study = read(ROOT / "evidence/results/rivals.jsonl")
    ours = "phi+loss-free(scale='nats')"
    names = {
        "no balancing": "none",
        "Switch loss": "switch",
        "loss-free bias": "loss-free",
        "φ-balancing": "phi",
        "**recommended**": ours,
    }
    metrics = (("loss", 3), ("maxvio", 2), ("dead_experts", 0), ("mi", 2))
    for name, setting in names.items():
        numbers = [f"{study.mean(setting, metric):.{digits}f}" for metric, digits in metrics]
        assert f"| {name} | {' | '.join(numbers)} |" in README
    gain = study.less("none", ours, "loss")
    low, high = gain.mean - gain.half, gain.mean + gain.half
    said = f"loss is {gain.mean:.3f} below no balancing (95 % interval {low:.3f} to {high:.3f})"
    assert said in " ".join(README.split())
    words = " ".join(README.split())
    rivals = [s for s in study.settings() if s not in ("none", ours)]
    signs = {rival: study.less(ours, rival, "loss").sign for rival in rivals}
    assert signs["switch"] == signs["loss-free"] == 0
    assert set(signs.values()) == {0}
    assert f"within seed noise of all other methods ([all {len(rivals) + 1}]" in words
    longer = read(ROOT / "evidence/results/longer.jsonl")
    ends = [longer.less("none", name, "loss") for name in (ours, "phi")]
    assert f"it ended {ends[0].mean:.3f} and φ alone {ends[1].mean:.3f} below no balancing" in words
    assert [end.sign for end in ends] == [0, 0]
    assert longer.seeds() == [0, 1]
    shown = {len(study.runs(name)) for name in names.values()}
    assert shown == {5}
    assert "means over five seeds" in README
    lowest = sorted(study.settings(), key=lambda setting: study.mean(setting, "maxvio"))[:2]
    assert lowest == ["phi+smebu(scale='nats')", ours]
    less = study.less("loss-free", ours, "maxvio")
    low, high = less.mean - less.half, less.mean + less.half
    said = f"{less.mean:.2f} below loss-free (interval {low:.2f} to {high:.2f})"
    assert low > 0
    ahead = study.mean(ours, "maxvio") - study.mean(lowest[0], "maxvio")
    assert f"{said}; only φ with SMEBU is lower, by {ahead:.2f}" in words


def test_the_recommended_method_is_the_one_that_the_written_rule_takes() -> None:
    from evidence.chapters.recommended import CELLS, NOISE, TESTS, recommend, regret, scores
    from evidence.study import read
    from moebalance.words.methods import build_method

    cells = {name: read(ROOT / f"evidence/results/{name}.jsonl") for name in CELLS}
    found = scores(cells)
    taken = recommend(found)
    assert build_method(taken) == mb.recommended()
    # Under a model's own bias, of the candidates that this bias can hold; none has no price.
    priced = {name: score for name, score in found.items() if "smebu" in name or "free" in name}
    held = {name: score for name, score in priced.items() if "nats" not in name}
    within = {name: s for name, s in held.items() if s.regret <= found[taken].regret + NOISE}
    assert build_method(recommend(within)) == mb.recommended(native_bias=True)
    reached = [f"{cell.mean(taken, 'maxvio'):.2f}" for cell in cells.values()]
    assert f"MaxVio there was {', '.join(reached[:2])} and {reached[2]}" in " ".join(README.split())
    assert all(cell.mean(taken, "dead_experts") == 0 for cell in cells.values())
    most = max(regret(cell, taken) for cell in cells.values())
    assert f"no candidate had a loss lower by more than {most:.3f}." in " ".join(README.split())
    tests = [read(ROOT / f"evidence/results/{name}.jsonl") for name in TESTS]
    for setting, metric, words, digits in (
        (taken, "maxvio", "MaxVio was", 2),
        (taken, "seen_maxvio", "On a sample of the training text MaxVio was", 2),
        ("none", "maxvio", "without balancing", 1),
    ):
        *first, last = (f"{cell.mean(setting, metric):.{digits}f}" for cell in tests)
        assert f"{words} {', '.join(first)} and {last}" in " ".join(README.split())
    reported = read(ROOT / "evidence/results/rivals.jsonl").seeds()
    assert not set(reported) & {seed for cell in cells.values() for seed in cell.seeds()}


def test_the_time_of_a_step_is_told_as_it_was_measured() -> None:
    results = json.loads((ROOT / "benchmarks/results/cost.json").read_text(encoding="utf-8"))

    def span(name: str) -> str:
        """The parts of balancing, in percent of a step without."""
        parts = [
            100 * (p["added_ms"] + p["end_ms"]) / row["variants"]["bare"]["time_ms"]
            for row in results["steps"]
            for p in (row["parts"][name],)
        ]
        return " to ".join(dict.fromkeys(f"{part:.1f}" for part in (min(parts), max(parts))))

    demo = summarise(find_runs(ROOT / "evidence/results/demo"))
    # Runs that were not interleaved say nothing of time, and the README no more than they do.
    assert all(method.step_time_ratio is None for section in demo for method in section.methods)
    assert "In the demo a step" not in README
    ours = "phi+loss-free(scale='nats')"
    both = f"{span('phi')} % with φ-balancing and {span(ours)} % with the recommended method"
    assert both in " ".join(README.split())
    assert both in " ".join(PRETRAINER.split())
