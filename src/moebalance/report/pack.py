"""Loads packed for the page: one byte a value, deflated, in base64.

A byte holds a ratio r to an even share on a logarithmic scale,

    code = 82 + round(12 log₂ r)    from 0.01× on,    1: less than that,    0: not measured,

so that a value comes back within 3 %, which is finer than the eye tells colours apart. The page's
script has the inverse (`script/maps.js`).
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence

from moebalance.metrics.image import DEAD

__all__ = ["DEAD", "code", "pack", "ratio", "thinned", "unpack"]

_EVEN, _PER_DOUBLING = 82, 12


def code(ratio: float | None) -> int:
    """The byte for a ratio to an even share; None is not measured.

    >>> [code(r) for r in (None, 0.0, 0.01, 1.0, 2.0, 1e9)]
    [0, 1, 2, 82, 94, 255]
    """
    if ratio is None:
        return 0
    if ratio < DEAD:
        return 1
    return min(max(_EVEN + round(_PER_DOUBLING * math.log2(ratio)), 2), 255)


def ratio(code: int) -> float | None:
    """The ratio that a byte stands for: what the page shows.

    >>> ratio(82), ratio(94), ratio(1), ratio(0)
    (1.0, 2.0, 0.0, None)
    """
    if code < 2:
        return 0.0 if code else None
    return math.exp2((code - _EVEN) / _PER_DOUBLING)


def pack(frames: Sequence[bytes]) -> dict[str, str | bool]:
    """Frames of equal length as text, as they are or as differences from the one before.

    Returns:
        `codes` (base64 of deflated bytes) and `delta` (whether each frame but the first holds
        differences modulo 256).

    Raises:
        ValueError: the frames have several lengths.
    """
    if len({len(frame) for frame in frames}) > 1:
        raise ValueError(f"frames of several lengths: {sorted({len(f) for f in frames})}")
    whole = zlib.compress(b"".join(frames), 9)
    before = [bytes(len(frames[0])), *frames] if frames else []
    changes = b"".join(
        bytes((now - then) % 256 for now, then in zip(frame, last, strict=True))
        for frame, last in zip(frames, before, strict=False)
    )
    shorter = zlib.compress(changes, 9)
    delta = len(shorter) < len(whole)
    return {"codes": base64.b64encode(shorter if delta else whole).decode(), "delta": delta}


def unpack(packed: dict[str, str | bool], length: int) -> list[bytes]:
    """The frames again, each of that length.

    >>> unpack(pack([b"ab", b"ac"]), 2)
    [b'ab', b'ac']
    """
    data = zlib.decompress(base64.b64decode(str(packed["codes"])))
    frames: list[bytes] = []
    for start in range(0, len(data), length):
        frame = data[start : start + length]
        if packed["delta"] and frames:
            frame = bytes((a + b) % 256 for a, b in zip(frame, frames[-1], strict=True))
        frames.append(frame)
    return frames


def thinned(count: int, most: int) -> list[int]:
    """Which of `count` frames to keep if `most` fit: evenly spread, always the last, and the first.

    >>> thinned(5, 9), thinned(9, 3), thinned(4, 1), thinned(0, 3)
    ([0, 1, 2, 3, 4], [0, 4, 8], [3], [])
    """
    if count <= most:
        return list(range(count))
    if most <= 1:
        return [count - 1]
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
