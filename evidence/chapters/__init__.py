"""The chapters of the evidence, a file a claim, in the order of the page."""

from evidence.chapter import Claim
from evidence.chapters import (
    finetuning,
    gap,
    length,
    memory,
    population,
    potentials,
    proportions,
    rate,
    recommended,
    rivals,
    scale,
    specialisation,
    stability,
    target,
)

CHAPTERS: tuple[Claim, ...] = (
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
    proportions.chapter,
    memory.chapter,
    recommended.chapter,
    length.chapter,
)
