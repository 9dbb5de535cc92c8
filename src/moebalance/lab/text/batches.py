"""Which sequence is read when: micro-batches are mixed, of one domain each, or change half-way.

The order is a list of indices that a seed fixes before training begins. The balancing method, the
accumulation and the number of workers do not change it. A longer run begins with the order of the
shorter one.

Each domain is a shuffled deck. Cards are dealt without replacement, and the deck is shuffled again
when it is used up; it depends on seed and domain alone. A turn goes to one sequence (`mixed`), or
to a whole micro-batch of B sequences (`one-domain`). Turns come in rounds of 8 micro-batches a
domain, in random order within the round. After every whole round both batchings have shown the same
number of tokens of every domain, and with equal weights the same sequences. (A proportional part of
a round that is not whole is rounded up or down at random, without bias.)

`shift` changes the text half-way: mixed micro-batches of the first half of the domains, then of the
second half. Only here a longer run does not begin with the order of the shorter one.
"""

from __future__ import annotations

import hashlib
from typing import get_args

import torch
from jaxtyping import Int, Int32
from torch import Tensor
from torch.utils.data import Dataset

from moebalance.lab.recipe import Batching
from moebalance.words.suggest import instead_of

BATCHINGS: tuple[str, ...] = get_args(Batching)
DOMAIN_WEIGHTS = ("equal", "proportional")

# Micro-batches of a domain in a round, on average. With 1, every window of D micro-batches would
# hold all D domains, and gradient accumulation over D would hide the bias under study.
_TURNS_PER_ROUND = 8


class TokenDataset(Dataset[dict[str, Tensor | int]]):
    """Sequences with the label of their domain, read in a fixed order.

    Items are `{"input_ids": (S,) int64, "labels": the same, "domain": int}`. The model shifts the
    labels, as every Hugging Face causal model does.

    Args:
        tokens: (N, S) ids.
        domains: (N,) position of each sequence's domain in `domain_names`.
        domain_names: Names of the domains.
        order: (M,) which sequence is item i; None reads all in turn.
    """

    def __init__(
        self,
        tokens: Int32[Tensor, "N S"],
        domains: Int[Tensor, " N"],
        domain_names: tuple[str, ...],
        order: Int[Tensor, " M"] | None = None,
    ) -> None:
        self.tokens = tokens
        self.domains = domains
        self.domain_names = domain_names
        self.order = torch.arange(len(tokens)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, item: int) -> dict[str, Tensor | int]:
        index = self.order[item]
        ids = self.tokens[index].long()
        return {"input_ids": ids, "labels": ids, "domain": int(self.domains[index])}

    def in_order(self, indices: Int[Tensor, " M"]) -> TokenDataset:
        """The same sequences in another order, for a loader that reads sequentially.

        Args:
            indices: (M,) from `ordered_indices`.

        Returns:
            A data set of M items that shares this one's tokens.
        """
        return TokenDataset(self.tokens, self.domains, self.domain_names, indices)


def ordered_indices(
    domains: Int[Tensor, " N"],
    *,
    batch_size: int,
    num_batches: int,
    batching: str = "mixed",
    seed: int = 0,
    domain_weights: str = "equal",
) -> Int[Tensor, " M"]:
    """The order in which a run reads its sequences.

    Args:
        domains: (N,) label of each sequence.
        batch_size: B, sequences in a micro-batch.
        num_batches: Micro-batches in all: optimizer steps times accumulation times ranks.
        batching: `"mixed"`, `"one-domain"` or `"shift"`.
        seed: Fixes the order.
        domain_weights: `"equal"` shows as many tokens of every domain, `"proportional"` as many as
            it has.

    Returns:
        (num_batches · B,) indices into `domains`; micro-batch i is the slice i·B : (i+1)·B.

    Raises:
        ValueError: An unknown name, a size below one, or no sequences; one domain only, or one
            micro-batch, to shift between.

    >>> domains = torch.tensor([0, 0, 0, 1, 1, 1])
    >>> order = ordered_indices(domains, batch_size=2, num_batches=4, batching="one-domain")
    >>> domains[order].view(4, 2).float().std(dim=1).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    _check_choice("batching", batching, BATCHINGS)
    _check_choice("domain_weights", domain_weights, DOMAIN_WEIGHTS)
    for name, value in (("batch_size", batch_size), ("num_batches", num_batches)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1.")
    if domains.numel() == 0:
        raise ValueError("there are no sequences to order; load text with load_data first.")
    if batching == "shift":
        return _shifted(domains, batch_size, num_batches, seed, domain_weights)
    sizes = domains.bincount()
    labels = sizes.nonzero().flatten()
    sizes = sizes[labels]
    weights = sizes.double() if domain_weights == "proportional" else torch.ones(len(labels))
    width = batch_size if batching == "one-domain" else 1  # sequences a turn
    turns = _turns(
        weights.double() / weights.sum(),
        num_batches * batch_size // width,
        turns_per_round=_TURNS_PER_ROUND * len(labels) * (batch_size // width),
        generator=_generator(seed, "turns"),
    ).repeat_interleave(width)
    order = torch.empty_like(turns)
    for position, label in enumerate(labels.tolist()):
        mine = turns == position
        members = (domains == label).nonzero().flatten()
        order[mine] = members[_deck(len(members), int(mine.sum()), _generator(seed, label))]
    return order


def _shifted(
    domains: Tensor, batch_size: int, num_batches: int, seed: int, domain_weights: str
) -> Int[Tensor, " M"]:
    """Mixed micro-batches of the first half of the domains, then of the others."""
    labels = domains.bincount().nonzero().flatten()
    if len(labels) < 2 or num_batches < 2:
        raise ValueError(
            f'batching "shift" with {len(labels)} domain(s) and {num_batches} micro-batch(es): it '
            "goes from one half of the domains to the other half-way, so give at least two of both."
        )
    first = torch.isin(domains, labels[: (len(labels) + 1) // 2])
    halves = ((first, num_batches - num_batches // 2), (~first, num_batches // 2))
    orders = []
    for members, count in halves:
        places = members.nonzero().flatten()
        order = ordered_indices(
            domains[places],
            batch_size=batch_size,
            num_batches=count,
            seed=seed,
            domain_weights=domain_weights,
        )
        orders.append(places[order])
    return torch.cat(orders)


def _turns(
    shares: Tensor, num_turns: int, *, turns_per_round: int, generator: torch.Generator
) -> Int[Tensor, " N"]:
    """Whose turn it is, (num_turns,): shuffled within rounds that keep the shares (D,)."""
    edges = torch.cat([shares.new_zeros(1), shares.cumsum(0)]) * turns_per_round
    # 1/3 + 1/3 + 1/3 must not lose a turn to rounding.
    edges = edges.round(decimals=6)
    rounds = []
    for _ in range(-(-num_turns // turns_per_round)):
        # Systematic sampling: a share of 2.7 turns gives 2 or 3, 2.7 on average; 8 gives 8.
        start = torch.rand((), generator=generator, dtype=shares.dtype)
        counts = (edges + start).floor().diff().long()
        turns = torch.arange(len(shares)).repeat_interleave(counts)
        rounds.append(turns[torch.randperm(len(turns), generator=generator)])
    return torch.cat(rounds)[:num_turns]


def _deck(size: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Deal `count` cards of `size`, shuffling again whenever all are dealt."""
    passes = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
    return torch.cat(passes)[:count] if passes else torch.empty(0, dtype=torch.int64)


def _generator(seed: int, purpose: str | int) -> torch.Generator:
    """Independent streams for one seed."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _check_choice(what: str, given: str, possible: tuple[str, ...]) -> None:
    if given not in possible:
        raise ValueError(f"{what} {given!r} is unknown.{instead_of(given, possible)}")
