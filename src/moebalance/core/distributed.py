"""Sums over ranks: one packed SUM an optimizer step, whatever the number of layers.

The ranks of a group hold the same layers and disjoint tokens: data-, context- and expert-parallel
ranks, and tensor-parallel ones where the sequence is sharded among them. Nothing but sums is ever
exchanged, so ragged batches, ranks with more micro-batches than others and ranks without a token
need no care: a method divides by the summed token count.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
"""A torch.distributed process group."""


def ranks_exist() -> bool:
    """Whether this process is one of a torch.distributed job."""
    return dist.is_available() and dist.is_initialized()


def check_group(group: Any) -> None:
    """Refuse what is no group of ranks, before anything is sent.

    Raises:
        TypeError: for example a DeviceMesh, or the name of one of its dimensions.
    """
    known = group is None or isinstance(group, Group)
    # Of a group that this rank is not in, torch gives a number; `sharing` refuses that in words.
    if not known and not (dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(
            f"group={group!r}: must be a torch.distributed.ProcessGroup. Of a DeviceMesh, give for "
            'example mesh["dp"].get_group().'
        )


def group_size(group: Group) -> int:
    """How many ranks a group has."""
    return dist.get_world_size(group)


def sharing(group: Group | None) -> Group | None:
    """The group to sum over: the one given, or the default one; None where there is one process.

    Raises:
        ValueError: this rank is not in the group it was given.
    """
    if not ranks_exist():
        return None
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"Rank {dist.get_rank()} is not in the balancing group it was given, and would balance "
            "its own tokens alone: give each rank the group that it belongs to."
        )
    return group if group is not None and dist.get_world_size(group) > 1 else None


@dataclass(frozen=True)
class Reduction:
    """A packed SUM that is under way.

    Attributes:
        message: what is summed in place.
        sizes: of its parts.
        work: torch's handle.
        ranks: how many take part.
        what: is summed, for errors.
    """

    message: Tensor
    sizes: list[int]
    work: Any
    ranks: int
    what: str

    def wait(self) -> tuple[Tensor, ...]:
        """The summed parts, in the order they were given.

        Raises:
            RuntimeError: another rank is stuck, dead or elsewhere; says what was waited for.
        """
        with waiting(self.what):
            self.work.wait()
        parts: tuple[Tensor, ...] = torch.split(self.message, self.sizes)
        return parts


def start_sum(parts: Sequence[Tensor], group: Group, what: str) -> Reduction:
    """Begin to sum vectors over a group, all in one message.

    Args:
        parts: the vectors.
        group: who adds up.
        what: is summed, for errors.
    """
    message = torch.cat([part.to(parts[0].device) for part in parts])
    with waiting(what):
        work = dist.all_reduce(message, group=group, async_op=True)
    return Reduction(message, [part.numel() for part in parts], work, group_size(group), what)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say in an error of torch.distributed what was waited for, and how long."""
    start = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"Waited {time.monotonic() - start:.0f} s for the other ranks to send {what}: {error} "
            "A rank is stuck, has ended, or called reduce(), step() and discard() in another "
            "order. Look at the logs of all ranks; then start from the last checkpoint."
        ) from error


def agree(description: dict[str, Any], group: Group, what: str = "what they balance") -> None:
    """Refuse ranks that balance different things, on every one of them.

    Args:
        description: of this rank, by what it describes.
        group: who compares.
        what: is described, for errors.

    Raises:
        RuntimeError: the descriptions differ; says between which ranks and in what.
    """
    theirs = gather(description, group, what)
    for rank, other in enumerate(theirs):
        for key, value in theirs[0].items():
            if other[key] != value:
                raise RuntimeError(
                    f"Ranks 0 and {rank} of the balancing group differ in {key}: {value!r} and "
                    f"{other[key]!r}. All ranks of a group must balance the same layers by the "
                    "same method; give pipeline stages, whose layers differ, a group each."
                )


def by_rank(names: list[str], group: Group | None) -> str:
    """Everyone's names in words, by rank if there are several."""
    if group is None:
        return ", ".join(names)
    everyones = enumerate(gather(names, group, "where they saw NaN"))
    return "; ".join(f"{', '.join(own)} on rank {rank}" for rank, own in everyones if own)


def gather(value: Any, group: Group, what: str) -> list[Any]:
    """Everyone's value, by rank in the group; slow, for the first step and for errors."""
    found: list[Any] = [None] * group_size(group)
    with waiting(what):
        dist.all_gather_object(found, value, group=group)
    return found
