"""Chapter 12, beyond the paper: a memory in tokens means the same at another batch size."""

from __future__ import annotations

import math
import statistics
from typing import Any

from evidence.chapter import (
    Chapter,
    Studies,
    Verdict,
    difference,
    estimate,
    in_words,
    not_run,
    table,
)
from evidence.chapters.rate import tokens_a_step
from evidence.figures import CYCLE, legend_below, logarithmic, panels, titles
from evidence.results import Study
from moebalance.report.estimates import Estimate

SIZES = ("memory_small", "memory_large")
RATE = "phi(strength=0.01, rate=0.1)"
MEMORY = "phi(strength=0.01, memory_tokens=9719)"
ADAPTED = "phi(strength=0.01, rate='auto')"
SCHEDULED = (
    "phi(strength=0.01, memory_tokens=9719, schedule={'warmup_tokens': 20480, "
    "'relax_after': 204800, 'relax_tokens': 102400, 'floor': 0.3})"
)
_WORDS = {
    RATE: "rate 0.1",
    MEMORY: "memory of 9719 tokens",
    ADAPTED: "adapted rate",
    SCHEDULED: "memory, scheduled strength",
}
SLUG, TITLE = "memory", "A memory in tokens"
CLAIM = (
    "With `memory_tokens=` a recipe keeps its balance at another batch size, where a rate does "
    "not (ours)."
)
_METRICS = (("loss", 3), ("maxvio", 2), ("soft_maxvio", 2), ("mi", 3))
_HEADS = ("Validation loss", "MaxVio", "Soft MaxVio", "Domain MI")


def chapter(studies: Studies) -> Chapter:
    """From one setting at two sizes of a step, the tokens in all being equal."""
    if any(name not in studies for name in SIZES):
        return not_run(SLUG, TITLE, CLAIM, SIZES)
    sizes = [studies[name] for name in SIZES]
    gained = [difference(study, MEMORY, RATE, "soft_maxvio") for study in sizes]
    better = [d is not None and d.half is not None and d.mean + d.half < 0 for d in gained]
    worse = [d is not None and d.half is not None and d.mean - d.half > 0 for d in gained]
    verdict = Verdict.HOLDS if any(better) and not any(worse) else Verdict.IN_PART
    if any(worse):
        verdict = Verdict.NOT_HERE
    said = "; ".join(
        f"{tokens_a_step(study)}: {in_words(d)}" for study, d in zip(sizes, gained, strict=True)
    )
    return Chapter(
        slug=SLUG,
        title=TITLE,
        claim=CLAIM,
        verdict=verdict,
        because="Soft MaxVio, which the price steers, with a memory less that with a rate, on "
        "either side of the size at which the two are one setting, by tokens a step: "
        f"{said}. (Rule: *holds* "
        "if lower beyond noise at one of the sizes and higher at none, *does not hold* if higher "
        "at one, else *in part*.)",
        body="\n\n".join(
            [
                "One-domain micro-batches of 512 tokens, one and eight of them a step, 410 "
                f"thousand tokens in all, {len(sizes[0].seeds())} seeds. Larger steps are fewer: "
                "compare settings within a size. At 1024 tokens a step a rate of 0.1 is a memory "
                "of 9719 tokens.",
                *(_table(study) for study in sizes),
                "### The adapted rate",
                "What `rate='auto'` ended with (geometric mean over seeds and layers of the last "
                "fortieth of training), and what memory that is. If loads walk as slowly and are "
                "as noisy per token, the memory is the same at every size.",
                table(
                    ["Tokens a step", "Rate", "Memory, tokens", "Soft MaxVio", "MaxVio"],
                    [_adapted(s) for s in sizes],
                ),
                "The last two columns are its balance less that with the memory given in tokens. "
                "It answers another question: which memory follows the load with the least error, "
                "and that is a long one where batches are noisy. What balances best is another "
                "memory: the price acts on a router that answers late.",
                "### A scheduled strength",
                "Warmed up over the first 5 % of the tokens, relaxed to 0.3 of itself between 50 "
                "and 75 %; less the same memory at a constant strength:",
                table(
                    ["Tokens a step", "Validation loss", "MaxVio"],
                    [
                        [
                            f"{tokens_a_step(study)}",
                            in_words(difference(study, SCHEDULED, MEMORY, "loss")),
                            in_words(difference(study, SCHEDULED, MEMORY, "maxvio"), 2),
                        ]
                        for study in sizes
                        if SCHEDULED in study.settings()
                    ],
                ),
            ]
        ),
        figures={"sizes": (_figure(sizes), "Balance against the size of a step; ± sd over seeds.")},
    )


def adapted_rate(study: Study) -> float:
    """The rate that the adaptive memory ended with; nan if it is not in the log."""
    last = [run.curve["rate"][-1] for run in study.select(ADAPTED) if run.curve.get("rate")]
    return statistics.geometric_mean(last) if last else math.nan


def _adapted(study: Study) -> list[str]:
    rate, tokens = adapted_rate(study), tokens_a_step(study)
    gained = [
        in_words(difference(study, ADAPTED, MEMORY, metric), 2)
        for metric in ("soft_maxvio", "maxvio")
    ]
    return [f"{tokens}", f"{rate:.3f}", f"{-tokens / math.log1p(-rate):,.0f}", *gained]


def _table(study: Study) -> str:
    rows = [
        [words, *(estimate(study, setting, metric, digits) for metric, digits in _METRICS)]
        for setting, words in _WORDS.items()
        if setting in study.settings()
    ]
    return table([f"{tokens_a_step(study)} tokens a step", *_HEADS], rows)


def _figure(sizes: list[Study]) -> Any:
    figure, axes = panels(2)
    tokens = [tokens_a_step(study) for study in sizes]
    shown = (("soft_maxvio", "Soft MaxVio"), ("maxvio", "MaxVio"))
    for ax, (metric, title) in zip(axes, shown, strict=True):
        for colour, (setting, words) in zip(CYCLE, _WORDS.items(), strict=False):
            found = [Estimate.of(s.by_seed(setting, metric).values()) for s in sizes]
            points = [(n, e) for n, e in zip(tokens, found, strict=True) if e is not None]
            ax.errorbar(
                [n for n, _ in points],
                [e.mean for _, e in points],
                yerr=[e.sd or 0.0 for _, e in points],
                fmt="o-",
                color=colour,
                markersize=4,
                label=words,
            )
        logarithmic(ax, x=True, y=True)
        titles(ax, title, "tokens a step", title)
    legend_below(figure, axes[0])
    return figure
