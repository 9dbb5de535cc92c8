"""Chapter 12, beyond the paper: a memory in tokens means the same at another batch size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from evidence.chapter import (
    Finding,
    Verdict,
    change,
    claim,
    differences,
    noise,
    settings_table,
    sign,
    table,
    text,
)
from evidence.figures import Panel, Series, draw
from evidence.study import METRICS, Studies, Study
from moebalance.report.canvas import CYCLE

SIZES = ("memory_small", "memory_large")
RATE = "phi(strength=0.32, rate=0.1)"
MEMORY = "phi(strength=0.32, memory_tokens=9719)"
ADAPTED = "phi(strength=0.32, rate='auto')"
SCHEDULED = (
    "phi(strength=0.32, memory_tokens=9719, schedule={'warmup_tokens': 20480, "
    "'relax_after': 204800, 'relax_tokens': 102400, 'floor': 0.3})"
)
_WORDS = {
    RATE: "rate 0.1",
    MEMORY: "memory of 9719 tokens",
    ADAPTED: "adapted rate",
    SCHEDULED: "memory, scheduled strength",
}
_METRICS = ("loss", "maxvio", "soft_maxvio", "mi")


@claim(
    slug="memory",
    title="A memory in tokens",
    text="Our own claim: with `memory_tokens=` a recipe keeps its balance at another batch size. "
    "With a rate it does not.",
    rule="*holds* if soft MaxVio with the memory is lower beyond seed noise at one of the sizes "
    "and higher at none, *does not* if it is higher at one, else *in part*.",
    needs=SIZES,
)
def chapter(studies: Studies) -> Finding:
    """From one setting at two sizes of a step, with as many tokens in all."""
    sizes = [studies[name] for name in SIZES]
    signs = [sign(study.less(MEMORY, RATE, "soft_maxvio")) for study in sizes]
    verdict = Verdict.HOLDS if -1 in signs else Verdict.IN_PART
    said = "; ".join(
        f"{study.tokens_a_step()}: {change(study, MEMORY, RATE, 'soft_maxvio')}" for study in sizes
    )
    return Finding(
        Verdict.NOT_HERE if 1 in signs else verdict,
        "The price steers soft MaxVio. The two settings are one at 1024 tokens a step. Soft "
        f"MaxVio, memory − rate, below and above that size, by tokens a step: {said}.",
        noise=noise(
            {f"{study.tokens_a_step()} tokens a step": study for study in sizes},
            *("loss", "soft_maxvio", "maxvio"),
        ),
        body=text(
            "One-domain micro-batches of 512 tokens, one or eight of them a step, 410 thousand "
            "tokens in all. Larger steps are fewer steps, so compare settings within a size. At "
            "1024 tokens a step a rate of 0.1 is a memory of 9719 tokens.",
            *(_table(study) for study in sizes),
            "### The adapted rate",
            "The table has the rate that `rate='auto'` ended with: geometric mean over seeds and "
            "layers, over the last fortieth of training. If loads drift as slowly and are as noisy "
            "per token, the memory in tokens is the same at every size. The last two columns are "
            "the adapted rate − the memory given in tokens.",
            table(
                ["Tokens a step", "Rate", "Memory, tokens", "Soft MaxVio", "MaxVio"],
                [_adapted(study) for study in sizes],
            ),
            "The adapted rate follows the load with the least error, which takes a long memory "
            "where batches are noisy. Balance needs another memory, because the price acts on a "
            "router that answers late.",
            "### A scheduled strength",
            "The strength is warmed up over the first 5 % of the tokens and relaxed to 0.3 of "
            "itself between 50 and 75 %. Scheduled − constant, with the same memory:",
            differences(
                [
                    (f"{study.tokens_a_step()}", study, SCHEDULED, MEMORY)
                    for study in sizes
                    if SCHEDULED in study.settings()
                ],
                ("loss", "maxvio"),
                head="Tokens a step",
            ),
        ),
        figures={"sizes": (_figure(sizes), "Balance against the size of a step; ± sd over seeds.")},
    )


def _table(study: Study) -> str:
    words = {s: w for s, w in _WORDS.items() if s in study.settings()}
    return settings_table(study, _METRICS, words, head=f"{study.tokens_a_step()} tokens a step")


def adapted_rate(study: Study) -> float:
    """The rate that the adaptive memory ended with; nan if it is not in the log."""
    last = [run.curve["rate"][-1] for run in study.runs(ADAPTED) if run.curve.get("rate")]
    return statistics.geometric_mean(last) if last else math.nan


def _adapted(study: Study) -> list[str]:
    rate, tokens = adapted_rate(study), study.tokens_a_step()
    gained = [change(study, ADAPTED, MEMORY, metric) for metric in ("soft_maxvio", "maxvio")]
    return [f"{tokens}", f"{rate:.3f}", f"{-tokens / math.log1p(-rate):,.0f}", *gained]


def _figure(sizes: Sequence[Study]) -> Any:
    shown = []
    for metric in ("soft_maxvio", "maxvio"):
        series = []
        for colour, (setting, words) in zip(CYCLE, _WORDS.items(), strict=False):
            found = [(s.tokens_a_step(), s.estimate(setting, metric)) for s in sizes]
            known = [(tokens, e) for tokens, e in found if e is not None]
            style = {"fmt": "o-", "color": colour, "markersize": 4}
            x, y = [tokens for tokens, _ in known], [e.mean for _, e in known]
            series.append(Series(words, x, y, style, y_sd=[e.sd or 0.0 for _, e in known]))
        title = METRICS[metric][0]
        shown.append(Panel(title, "tokens a step", title, series, log="xy"))
    return draw(shown)
