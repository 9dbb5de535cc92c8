"""Many rows in little room: a column for each key, numbers as numbers and not as objects.

A float is 24 bytes as a Python object, 8 bytes in a column; the keys of a row are said once for
all. A row is made anew when it is asked for, equal to the one that came in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, overload

from moebalance.runlog.rows import Row

_ABSENT: Any = object()
_TYPES = {float: "d", int: "q"}
Column = Any
"""An array of numbers of one type; or a list, where other values came along."""


class _Held(Sequence[Row]):
    """Rows that are made anew when they are asked for, as a list would give them."""

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | Sequence[Row]:
        places = range(len(self))
        if isinstance(at, slice):
            return Chosen(self, places[at])
        return self._row(places[at])  # raises as a list does

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _row(self, place: int) -> Row:
        raise NotImplementedError


class Rows(_Held):
    """Rows that were appended one by one, kept by columns.

    >>> rows = Rows([{"step": 1, "loss": 2.5}, {"step": 2, "load": [[0.5, 0.5]]}])
    >>> rows[1], rows.column("loss")
    ({'step': 2, 'load': [[0.5, 0.5]]}, [2.5, None])
    """

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._count, self._columns = 0, dict[str, Column]()
        self._keys: list[tuple[str, ...]] = []
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}
        for row in rows:
            self.append(row)

    def append(self, row: Row) -> None:
        """Add a row at the end."""
        for key, value in row.items():
            held = self._columns.get(key)
            if type(value) is float and type(held) is array and held.typecode == "d":
                held.append(value)  # nearly always
                continue
            if held is None:
                kind = _TYPES.get(type(value))
                held = array(kind) if kind and not self._count else [_ABSENT] * self._count
            self._columns[key] = _with(held, _packed(value))
        keys = tuple(row)
        self._keys.append(self._known.setdefault(keys, keys))
        self._count += 1
        for key, held in self._columns.items() if len(keys) < len(self._columns) else ():
            if len(held) < self._count:
                self._columns[key] = _with(held, _ABSENT)

    def column(self, key: str) -> Sequence[Any]:
        """The values of a key, None where a row has none."""
        held = self._columns.get(key, [_ABSENT] * self._count)
        return held if isinstance(held, array) else [_plain(value) for value in held]

    def __len__(self) -> int:
        return self._count

    def _row(self, place: int) -> Row:
        return {key: _plain(self._columns[key][place]) for key in self._keys[place]}


class Chosen(_Held):
    """Some of the rows, made anew when they are asked for."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        self._rows, self._places = rows, places

    def column(self, key: str) -> Sequence[Any]:
        """The values of a key, None where a row has none."""
        held = column(self._rows, key)
        return [held[place] for place in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def _row(self, place: int) -> Row:
        return self._rows[self._places[place]]


def column(rows: Sequence[Row], key: str) -> Sequence[Any]:
    """The values of a key in rows of any kind, None where a row has none."""
    return rows.column(key) if isinstance(rows, Rows | Chosen) else [row.get(key) for row in rows]


class _Load(NamedTuple):
    """A list of lists of floats: all numbers, and how many each list has."""

    numbers: array[float]
    lengths: tuple[int, ...]

    def lists(self) -> list[list[float]]:
        numbers = iter(self.numbers.tolist())
        return [[next(numbers) for _ in range(length)] for length in self.lengths]


def _with(held: Column, value: Any) -> Column:
    """The column with one value more; a list from where the array cannot hold it."""
    if isinstance(held, array):
        if type(value) is (float if held.typecode == "d" else int):
            try:
                held.append(value)
            except OverflowError:
                pass
            else:
                return held
        held = held.tolist()
    held.append(value)
    return held


def _packed(value: Any) -> Any:
    if not isinstance(value, list) or not value or {type(part) for part in value} != {list}:
        return value
    if {type(number) for part in value for number in part} != {float}:
        return value
    numbers = array("d")
    for part in value:
        numbers.fromlist(part)
    return _Load(numbers, tuple(map(len, value)))


def _plain(value: Any) -> Any:
    if value is _ABSENT:
        return None
    return value.lists() if isinstance(value, _Load) else value
