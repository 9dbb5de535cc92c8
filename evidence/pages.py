"""The pages of numbers in docs/, made from committed results alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from evidence.chapter import Claim, Finding, text
from evidence.chapters import CHAPTERS
from evidence.gpu_page import write_gpu_page
from evidence.keep import TABLES, load
from evidence.study import Studies
from moebalance.lab.bench import write_page as write_cost_page
from moebalance.report import write_figure, write_markdown
from moebalance.report.canvas import save
from moebalance.runlog import find_runs

_INTRO = """\
# Evidence

This page tests each claim of the paper, and six claims of our own. Each has a recipe, runs, a
figure, and a verdict by a rule that was written before the runs. `python -m evidence` makes this
page from `evidence/results`. The recipes are in `evidence/recipes`;
`python -m evidence --run NAME` trains one of them again.

Read it with four limits in mind.

- **Size.** The models are tiny: 0.1 to 1 million active parameters, most with 32 experts, top-4,
  trained for minutes on a CPU with the text that Python ships, read as bytes. The paper trains 111
  to 986 million active parameters on C4. A claim that does not hold here may hold there.
- **Length.** Chapters 10 to 12 train for 100 to 800 steps, chapter 14 for 5000, the others for
  2000.
- **Seed noise.** Each chapter states it first: the standard deviation of a single run over seeds,
  root mean square over settings. A difference counts only if its interval leaves out zero.
- **Intervals.** They are Student's 95 % intervals of differences that are paired over seeds. They
  are not corrected for the number of comparisons."""


def write_all(results: Path, benchmarks: Path, docs: Path) -> list[tuple[Claim, Finding]]:
    """Write every page that is made from results.

    Args:
        results: folder of studies.
        benchmarks: folder of `cost.json` and `h200.json`.
        docs: the documentation's folder.

    Returns:
        The chapters of docs/evidence.md.
    """
    for name in TABLES:
        write_markdown(find_runs(results / name), docs / f"{name}.md", f"Results: {name}")
    write_figure(find_runs(results / "demo"), docs / "demo.svg")
    cost, gpu = (
        json.loads((benchmarks / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("cost", "h200")
    )
    write_cost_page(cost, docs / "cost.md", plot="cost.svg")
    write_gpu_page(gpu, docs / "cost_gpu.md")
    return write_page(load(results), docs / "evidence.md")


def write_page(studies: Studies, page: Path) -> list[tuple[Claim, Finding]]:
    """Write docs/evidence.md: a table of verdicts, then the chapters.

    Args:
        studies: by name.
        page: the Markdown file; figures go to a folder next to it with the same name.

    Returns:
        The chapters.
    """
    found = [(claim, claim(studies)) for claim in CHAPTERS]
    parts = [
        _chapter(number, claim, finding, page)
        for number, (claim, finding) in enumerate(found, start=1)
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text(_INTRO, _summary(found), _made_with(studies), *parts) + "\n", "utf-8")
    return found


def _summary(found: Sequence[tuple[Claim, Finding]]) -> str:
    rows = [
        f"| {number} | [{claim.title}](#{_anchor(number, claim)}) | **{finding.verdict.value}** |"
        for number, (claim, finding) in enumerate(found, start=1)
    ]
    return "\n".join(["| | Claim | Verdict |", "| ---: | --- | --- |", *rows])


def _anchor(number: int, claim: Claim) -> str:
    """The heading's anchor, as GitHub makes it."""
    words = f"{number}. {claim.title}".lower().replace(" ", "-")
    return "".join(c for c in words if c.isalnum() or c in "-_")


def _chapter(number: int, claim: Claim, finding: Finding, page: Path) -> str:
    figures = []
    for name, (figure, words) in finding.figures.items():
        file = page.with_suffix("") / f"{claim.slug}-{name}.svg"
        save(figure, file)
        figures += [f"![{words}]({page.stem}/{file.name})", f"*{words}*"]
    return text(
        f"## {number}. {claim.title}",
        f"**Claim.** {claim.text}",
        f"**Seed noise.** {finding.noise}" if finding.noise else "",
        f"**Verdict: {finding.verdict.value}.** {finding.because}",
        f"**Rule.** {claim.rule[0].upper()}{claim.rule[1:]}",
        *figures,
        finding.body,
    )


def _made_with(studies: Studies) -> str:
    commits = {commit[:9] for study in studies.values() for commit in study.about["commits"]}
    runs = sum(len(study.results) for study in studies.values())
    versions = next(iter(studies.values())).about["versions"] if studies else {}
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"`evidence/results` holds {runs} runs, made at commits {', '.join(sorted(commits))}, with "
        f"{made}."
    )
