"""One training step's tokens over micro-batches and ranks: every layout that is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from layout_models import (
    Block,
    ExpertParallelBlock,
    NamedBlock,
    NamedExpertParallelBlock,
    NamedSequenceParallelBlock,
    NamedTensorParallelBlock,
    SequenceParallelBlock,
    Stack,
    TensorParallelBlock,
    dense_first,
)

SEQUENCES, LENGTH = 8, 8

Cut = tuple[slice, slice]
"""A batch: which sequences, and which positions of them."""

WHOLE = slice(None)


def cuts(*sequences: int, start: int = 0) -> tuple[Cut, ...]:
    """Batches of so many sequences each."""
    ends = [start + sum(sequences[: n + 1]) for n in range(len(sequences))]
    return tuple((slice(end - size, end), WHOLE) for end, size in zip(ends, sequences, strict=True))


def halves(axis: int) -> tuple[tuple[Cut, ...], ...]:
    """One batch on each of two ranks: halves of the sequences (0) or of every sequence (1)."""
    size = (SEQUENCES, LENGTH)[axis] // 2
    ranges = [slice(0, size), slice(size, 2 * size)]
    return tuple((((r, WHOLE) if axis == 0 else (WHOLE, r)),) for r in ranges)


def shard(model: Stack) -> nn.Module:
    """FSDP2, each layer a unit."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers.values():
        fully_shard(layer)
    return fully_shard(model)


@dataclass(frozen=True)
class Layout:
    """How a step is laid out.

    Args:
        batches: of each rank.
        block: what a layer is made of.
        wrap: data parallelism, which averages gradients over ranks.
        summed: names of weights whose gradients the ranks add up themselves.
        alone: ranks hold different layers or the same tokens; each balances by itself.
        tokens: which tokens are real: "all", "ragged" sequences, or of the "first half" only.
        staged: each rank holds one layer, and gets micro-batches of two sequences.
    """

    batches: tuple[tuple[Cut, ...], ...]
    block: Callable[..., nn.Module] = Block
    wrap: Callable[[Stack], nn.Module] | None = None
    summed: tuple[str, ...] = ()
    alone: bool = False
    tokens: str = "all"
    staged: bool = False

    @property
    def named(self) -> bool:
        """Whether `attach` is told which modules are the routers."""
        kinds = isinstance(self.block, type) and issubclass(self.block, NamedBlock)
        return kinds or self.block is dense_first

    @property
    def cuts_sequences(self) -> bool:
        return any(positions != WHOLE for batches in self.batches for _, positions in batches)


TOKENS = ("all", "ragged", "first half", "left half")

ONE = {tokens: Layout((cuts(8),), tokens=tokens) for tokens in TOKENS}
"""The reference: all tokens in one batch of one process."""

ALONE = {
    "accumulation 2": Layout((cuts(4, 4),)),
    "accumulation 4": Layout((cuts(2, 2, 2, 2),)),
}
PAIRS = {
    "DDP 2": Layout(halves(0), wrap=DistributedDataParallel),
    "FSDP2 2": Layout(halves(0), wrap=shard),
    "TP 2": Layout((cuts(8), cuts(8)), block=TensorParallelBlock, alone=True),
    "TP 2 + sequence": Layout(halves(1), block=SequenceParallelBlock, summed=("gate",)),
    "CP 2": Layout(halves(1), wrap=DistributedDataParallel),
    "EP 2": Layout(halves(0), block=ExpertParallelBlock, summed=("gate",)),
    "PP 2": Layout((cuts(2, 2, 2, 2),) * 2, staged=True, alone=True),
}
QUADS = {
    "DDP 4": Layout(
        tuple(cuts(2, start=2 * rank) for rank in range(4)), wrap=DistributedDataParallel
    )
}
RAGGED_ALONE = {
    "accumulation 4, padding": Layout((cuts(2, 2, 2, 2),), tokens="ragged"),
    "accumulation 4, two of them empty": Layout((cuts(2, 2, 2, 2),), tokens="first half"),
}
RAGGED_PAIRS = {
    "DDP 2, padding": Layout(halves(0), wrap=DistributedDataParallel, tokens="ragged"),
    "DDP 2, one rank empty": Layout(halves(0), wrap=DistributedDataParallel, tokens="first half"),
    "DDP 2, 3 and 1 micro-batches": Layout(
        (cuts(2, 2, 2), cuts(2, start=6)), wrap=DistributedDataParallel, tokens="ragged"
    ),
    "FSDP2 2, one rank empty": Layout(halves(0), wrap=shard, tokens="first half"),
    "CP 2, one rank empty": Layout(halves(1), wrap=DistributedDataParallel, tokens="left half"),
    "EP 2, padding": Layout(
        halves(0), block=ExpertParallelBlock, summed=("gate",), tokens="ragged"
    ),
}


NAMED_ALONE = {
    "accumulation 4": Layout((cuts(2, 2, 2, 2),), block=NamedBlock),
    "accumulation 4, padding": Layout((cuts(2, 2, 2, 2),), block=NamedBlock, tokens="ragged"),
}
NAMED_PAIRS = {
    "DDP 2": Layout(halves(0), block=NamedBlock, wrap=DistributedDataParallel),
    "DDP 2, padding": Layout(
        halves(0), block=NamedBlock, wrap=DistributedDataParallel, tokens="ragged"
    ),
    "FSDP2 2": Layout(halves(0), block=NamedBlock, wrap=shard),
    "FSDP2 2, one rank empty": Layout(halves(0), block=NamedBlock, wrap=shard, tokens="first half"),
    "CP 2": Layout(halves(1), block=NamedBlock, wrap=DistributedDataParallel),
    "TP 2": Layout((cuts(8), cuts(8)), block=NamedTensorParallelBlock, alone=True),
    "TP 2 + sequence": Layout(halves(1), block=NamedSequenceParallelBlock, summed=("gate.weight",)),
    "EP 2": Layout(halves(0), block=NamedExpertParallelBlock, summed=("gate.weight",)),
    "PP 2": Layout((cuts(2, 2, 2, 2),) * 2, block=NamedBlock, staged=True, alone=True),
}
"""Layers whose gate is a linear map, named to `attach`; held against `BalancedRouter`s."""

DENSE_ALONE = {"dense first": Layout((cuts(8),), block=dense_first)}
DENSE_PAIRS = {
    "PP 2, dense first stage": Layout(
        (cuts(2, 2, 2, 2),) * 2, block=dense_first, staged=True, alone=True
    )
}
"""A pipeline whose first stage has no experts; held against one process."""
