"""A process group in one process: each rank is a thread, and nothing is waited for in vain.

`Town` stands in the place of `torch.distributed` for `moebalance.core.distributed`. A collective
that cannot end, because all other ranks wait too or have left, fails at once, as a real one does
after its timeout.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from moebalance.core import distributed

_LIMIT_S = 60
"""Far above what a test takes; it turns a mistake of this file into a failure."""


class Town:
    """The ranks of one group, and what they have sent each other.

    Args:
        ranks: how many.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.group = _Groups(self)
        self.sent = [0] * ranks
        """Collectives that each rank has entered."""
        self._calls: list[_Call] = []
        self._blocked: dict[int, _Call] = {}
        self._left: set[int] = set()
        self._news = threading.Condition()
        self._here = threading.local()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` on every rank: what each returned, or the exception that ended it."""
        answers: list[Any] = [None] * self.ranks

        def live(rank: int) -> None:
            self._here.rank = rank
            try:
                answers[rank] = work(rank)
            except Exception as error:
                answers[rank] = error
            with self._news:
                self._left.add(rank)
                self._news.notify_all()

        threads = [
            threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(self.ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_LIMIT_S)
            assert not thread.is_alive(), "a rank hangs"
        return answers

    # What `moebalance.core.distributed` asks of torch.distributed.

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return hasattr(self._here, "rank")

    def get_rank(self, group: Any = None) -> int:
        return self._here.rank

    def get_world_size(self, group: Any = None) -> int:
        return self.ranks

    def all_reduce(self, message: Tensor, group: Any = None, async_op: bool = False) -> Any:
        assert async_op
        call = self._enter(("sum", message.shape), message.clone())
        return _Work(self, call, message)

    def all_gather_object(self, found: list[Any], value: Any, group: Any = None) -> None:
        call = self._enter(("gather",), value)
        self.wait(call)
        found[:] = [call.values[rank] for rank in range(self.ranks)]

    def wait(self, call: _Call) -> None:
        """Until all have entered a collective; fail if some never will, or entered another one."""
        rank = self._here.rank
        with self._news:
            self._blocked[rank] = call
            self._news.notify_all()
            while len(call.values) < self.ranks:
                waited_for = set(range(self.ranks)) - call.values.keys()
                stuck = {r for r, c in self._blocked.items() if len(c.values) < self.ranks}
                if waited_for & self._left or stuck | self._left == set(range(self.ranks)):
                    break
                assert self._news.wait(_LIMIT_S), "nothing happens"
            done = len(call.values) == self.ranks
            if done:
                del self._blocked[rank]
        if not done:
            raise RuntimeError("Timed out.")
        if len(set(call.kinds.values())) > 1:
            raise RuntimeError("Timed out: ranks are in different collectives.")

    def _enter(self, kind: tuple[Any, ...], value: Any) -> _Call:
        rank = self._here.rank
        with self._news:
            if self.sent[rank] == len(self._calls):
                self._calls.append(_Call())
            call = self._calls[self.sent[rank]]
            self.sent[rank] += 1
            call.values[rank], call.kinds[rank] = value, kind
            self._news.notify_all()
        return call


@dataclass
class _Call:
    """One collective: what each rank brought to it."""

    values: dict[int, Any] = field(default_factory=dict)
    kinds: dict[int, tuple[Any, ...]] = field(default_factory=dict)


class _Groups:
    """`torch.distributed.group`."""

    def __init__(self, town: Town) -> None:
        self.WORLD = town


class _Work:
    """A sum that is under way."""

    def __init__(self, town: Town, call: _Call, message: Tensor) -> None:
        self.town, self.call, self.message = town, call, message

    def wait(self) -> None:
        self.town.wait(self.call)
        values = [self.call.values[rank] for rank in range(self.town.ranks)]
        self.message.copy_(torch.stack(values).sum(dim=0))


@contextmanager
def town(ranks: int) -> Iterator[Town]:
    """A group of so many threads, for the length of a block."""
    with pytest.MonkeyPatch.context() as patch:
        found = Town(ranks)
        patch.setattr(distributed, "dist", found)
        yield found
