"""One line of a run log: what it must be, and how it is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moebalance.files import loads

FORMAT = 1
LOG_NAME = "log.jsonl"
KINDS = ("header", "step", "snapshot", "eval", "end")

Row = Mapping[str, Any]

_COUNTS = ("steps", "tokens", "train_tokens", "val_tokens", "num_experts", "top_k", "parameters")
_WITH_STEP = ("step", "snapshot", "eval")
# Numbers of so many digits, or with an exponent of two, are rare; only then each is looked at.
_ALIKE = bytes.maketrans(b"123456789E", b"000000000e")
_HUGE = (b"0" * 60, b"0e00", b"0e+00")
# Half a character, which JSON can hold and no page, terminal or file: read as a question mark,
# which is what our own logs hold for it. Two halves in a row are a whole one.
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(line: bytes) -> tuple[dict[str, Any], str]:
    """The row and an empty string, or an empty row and what is wrong with it."""
    # Python's reader would take NaN and Infinity, which are not JSON, and integers of any length,
    # of which nothing can be computed; read them as missing.
    options: dict[str, Any] = {"parse_constant": lambda _: None}
    alike = line.translate(_ALIKE)
    if any(huge in alike for huge in _HUGE):
        options |= {"parse_int": partial(_sane, int), "parse_float": partial(_sane, float)}
    try:
        row = loads(line, **options)
        if _HALF.search(line):
            row = loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
    except ValueError as error:
        return {}, f"not JSON ({error})"
    found = problem(row)
    return ({}, found) if found else (row, "")


def problem(row: Any) -> str:
    """What is wrong with a row; empty if nothing."""
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return 'not a JSON object with a "kind"'
    step: Any = row.get("step")
    if row["kind"] in _WITH_STEP and (type(step) is not int or not 0 <= step < 2**63):
        return f'a {row["kind"]} row needs an integer "step" from 0 on, got {shown(step)}'
    if row["kind"] == "header":
        if type(row.get("format")) is not int:
            return f'a header needs an integer "format", got {shown(row.get("format"))}'
        if not isinstance(row.get("method"), str):
            return f'a header needs a "method", got {shown(row.get("method"))}'
        return _below_zero(row, ("model", "data"))
    return _below_zero(row)


def _below_zero(row: Row, inside: tuple[str, ...] = ()) -> str:
    """Which number of things is below 0, in the row or in its tables; empty if none."""
    for where in ("", *inside):
        table = row.get(where) if where else row
        for key in _COUNTS if isinstance(table, Mapping) else ():
            value: Any = table.get(key)  # type: ignore[union-attr]
            if type(value) in (int, float) and value < 0:
                return f'"{key}" is {shown(value)}, and must be at least 0'
    return ""


def check_header(file: Path, line: bytes, row: Row, found: str) -> None:
    """Refuse a first line that is no header of ours.

    Raises:
        ValueError: names the file and what stands there.
    """
    if found or row["kind"] != "header":
        raise ValueError(
            f"{file} is not a moebalance run log: the first line must be the header, a JSON object "
            f'with "kind": "header", and is {line[:60]!r} ({found or "another kind of row"}). '
            f"Give a {LOG_NAME} written by moebalance."
        )
    if row["format"] > FORMAT:
        raise ValueError(
            f"{file} has log format {row['format']}; this moebalance reads up to {FORMAT}. "
            "Upgrade moebalance to read it."
        )


def time(value: Any) -> float | None:
    """A time as a number of seconds, or None."""
    return float(value) if type(value) in (int, float) and 0 <= value < math.inf else None


def shown(value: Any) -> str:
    """A value as an error shows it, cut if long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _sane(kind: type[int] | type[float], digits: str) -> float | None:
    # Far beyond what is measured, and its square and its sum with others are still numbers.
    return kind(digits) if abs(float(digits)) < 1e100 else None
