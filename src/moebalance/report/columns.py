"""The numbers that tables show: key in the log, title, decimals, and what each means in words."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_LOSS = 0.02
"""Nats: a smaller difference of losses is noise where no seeds say otherwise."""


@dataclass(frozen=True)
class Metric:
    """One column: its key in the log, its title, its decimals and what it means in words.

    ``good`` and ``concern`` are rules of thumb, empty where there is none.
    """

    key: str
    title: str
    digits: int
    meaning: str
    good: str = ""
    concern: str = ""

    @property
    def help(self) -> str:
        """Meaning and rules of thumb in one paragraph."""
        tail = f" Good: {self.good}. Concerning: {self.concern}." if self.good else ""
        return self.meaning + tail


METRICS = (
    Metric(
        "loss",
        "Validation loss",
        3,
        "Mean cross-entropy on held-out text, in nats per token. Lower is better. Differences of "
        "the size of the ± are noise.",
        good="no higher than without balancing",
        concern="higher than without balancing by more than the ±: the pressure costs quality",
    ),
    Metric(
        "maxvio",
        "MaxVio global",
        2,
        "How far the busiest expert lies above an even share, over the whole evaluation set: "
        "largest load / mean load − 1, averaged over layers. 0 is perfect; 1 means that one "
        "expert gets twice its share; above about 1, experts are wasted and parallel ones wait.",
        good="below about 0.3",
        concern="above about 1",
    ),
    Metric(
        "maxvio_batch",
        "MaxVio batch",
        2,
        "The same within single batches. Always larger than the global one, because a batch is a "
        "sample; this is what expert parallelism feels at each step.",
        good="little above the global one",
        concern="several times the global one: batches differ much, and parallel experts wait",
    ),
    Metric(
        "soft_maxvio",
        "Soft MaxVio",
        2,
        "MaxVio of the router's probabilities before top-k. Methods that charge the loss steer "
        "this number directly.",
        good="below about 0.2",
        concern="near 0 while MaxVio global stays high: look at the soft–hard gap",
    ),
    Metric(
        "soft_hard_gap",
        "Soft–hard gap",
        3,
        "How far the load that top-k delivers lies from the load that the probabilities promise: "
        "the share of load that would have to move (total variation distance). Small is good; a "
        "large gap with a small soft MaxVio means that probabilities are balanced, not work.",
        good="below about 0.05",
        concern="above about 0.2",
    ),
    Metric(
        "gini",
        "Gini",
        3,
        "Inequality of load over the experts: 0 when all are equal, near 1 when one does all. "
        "At 0.4 a few experts carry the layer.",
        good="below 0.1",
        concern="above 0.4",
    ),
    Metric(
        "entropy",
        "Entropy",
        3,
        "Entropy of the load divided by its largest value: 1 is uniform. It is forgiving: 0.95 "
        "can hide several dead experts.",
        good="above 0.99",
        concern="below 0.95",
    ),
    Metric(
        "dead_experts",
        "Dead experts",
        1,
        "Experts, over all layers, that got less than 1 % of an even share. 0 is good; each one is "
        "memory that learns next to nothing.",
        good="0",
        concern="any that stays dead",
    ),
    Metric(
        "mi",
        "Domain MI",
        3,
        "Mutual information between a token's domain and its expert, in nats: how much experts "
        "specialise. 0 means that every expert sees the same mix. Balance bought with MI near 0 "
        "may have cost specialisation.",
        good="as high as without balancing, or higher",
        concern="near 0 where the runs without balancing are not",
    ),
    Metric(
        "purity",
        "Purity",
        3,
        "The share of an expert's tokens that come from its main domain, averaged over experts by "
        "load. The largest domain's share of the text means no specialisation, 1 means that every "
        "expert serves one domain only.",
        good="well above the largest domain's share of the text",
        concern="no more than that share",
    ),
)
# Before and after fine-tuning, on the text it was tuned on and on the text that the model knew.
NEW_TEXT = (
    Metric("loss", "New text: loss", 3, "Cross-entropy on held-out text of the new kind."),
    Metric("maxvio", "New text: MaxVio", 2, "Global MaxVio on that text."),
    Metric("dead_experts", "New text: dead experts", 1, "Dead experts on that text."),
)
OLD_TEXT = (
    Metric(
        "old_loss",
        "Old text: loss",
        3,
        "Cross-entropy on held-out text of the kind that the model knew. Its rise is forgetting.",
    ),
    Metric("old_maxvio", "Old text: MaxVio", 2, "Global MaxVio on that text."),
    Metric("old_dead_experts", "Old text: dead experts", 1, "Dead experts on that text."),
)
