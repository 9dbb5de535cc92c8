"""The chapters of the evidence, a file a claim, in the order of the page."""

from collections.abc import Callable

from evidence.chapter import Chapter, Studies
from evidence.chapters import (
    finetuning,
    gap,
    memory,
    population,
    potentials,
    rate,
    rivals,
    scale,
    shares,
    specialisation,
    stability,
    target,
)

CHAPTERS: tuple[Callable[[Studies], Chapter], ...] = (
    population.chapter,
    rivals.chapter,
    potentials.chapter,
    rate.chapter,
    stability.chapter,
    specialisation.chapter,
    finetuning.chapter,
    scale.chapter,
    gap.chapter,
    target.chapter,
    shares.chapter,
    memory.chapter,
)
