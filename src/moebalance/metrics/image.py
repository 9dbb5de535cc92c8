"""A load as a small picture, for TensorBoard, W&B and the like; needs numpy alone.

Each cell is an expert of a layer, coloured by its load as a multiple of an even one: blue has less,
red has more, nearly white is even, magenta is dead. The report's figures have the same colours.

Shapes: L layers, E experts, H and W pixels.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

SHADES = (
    *("#0b3c73", "#2a5f98", "#5584b6", "#84a8cd", "#b2c9e0", "#d9e3ec", "#f0efeb"),
    *("#f6dfce", "#f3c3a0", "#e79d6c", "#d4743c", "#b1501c", "#832f06"),
)
"""From ¼× to 4× an even load in thirds of a doubling; the middle one is an even load."""
DEAD_SHADE = "#b5008c"
NO_LOAD = "#9a9a9a"
"""A cell without an expert, or of a layer that counted nothing."""
DEAD = 0.01
"""Below this multiple of an even load an expert counts as dead."""
_WIDEST, _LARGEST, _SMALLEST = 768, 16, 2

Pixels = NDArray[np.uint8]


def load_image(loads: Sequence[ArrayLike], *, cell: int | None = None) -> Pixels:
    """Layer × expert as pixels (H, W, 3), for example for `SummaryWriter.add_image`.

    Args:
        loads: hard load (E,) of each layer, counts or fractions; E may differ.
        cell: pixels of a cell's side; by default 2 to 16, so that the picture is about 768 wide.

    Raises:
        ValueError: there is no layer, a load is not one-dimensional, or `cell` is below 1.

    >>> load_image([[2, 1, 1, 0], [1, 1, 1, 1]], cell=4).shape
    (8, 16, 3)
    """
    rows = [np.asarray(load, dtype=float) for load in loads]
    shapes = [row.shape for row in rows]
    if not rows or any(len(shape) != 1 or not shape[0] for shape in shapes):
        raise ValueError(
            f"load_image got loads of shapes {shapes}: give one load (E,) for each layer, for "
            "example [hard.cpu() for hard, _ in balancing.loads().values()]."
        )
    if cell is not None and cell < 1:
        raise ValueError(f"load_image(cell={cell}): give the pixels of a cell's side, 1 or more.")
    width = max(len(row) for row in rows)
    side = cell or max(_SMALLEST, min(_LARGEST, _WIDEST // max(width, len(rows))))
    codes = np.full((len(rows), width), len(_COLOURS) - 1)
    for code, row in zip(codes, rows, strict=True):
        code[: len(row)] = _codes(row)
    pixels: Pixels = _COLOURS[codes].repeat(side, axis=0).repeat(side, axis=1)
    return pixels


def png(pixels: Pixels) -> bytes:
    """Pixels (H, W, 3) as a PNG file.

    >>> png(load_image([[1, 1]], cell=1))[:4]
    b'\\x89PNG'
    """
    height, width, _ = pixels.shape
    # A zero in front of each line: it is stored as it is, without PNG's filters.
    lines = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 6)
    chunks = ((b"IHDR", head), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _codes(load: NDArray[np.float64]) -> NDArray[np.intp]:
    """The colour of each expert, as an index."""
    total = load.sum()
    if not (np.isfinite(total) and total > 0):
        return np.full(load.shape, len(_COLOURS) - 1)
    ratio = load * len(load) / total
    middle = len(SHADES) // 2
    # DEAD is far beyond the last shade, so that the logarithm needs no other guard.
    thirds = np.rint(3 * np.log2(np.maximum(ratio, DEAD))).astype(int)
    shade = thirds.clip(-middle, middle) + middle
    return np.asarray(np.where(ratio < DEAD, len(SHADES), shade))


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def _channels(colour: str) -> tuple[int, int, int]:
    red, green, blue = bytes.fromhex(colour[1:])
    return red, green, blue


_COLOURS = np.array([_channels(c) for c in (*SHADES, DEAD_SHADE, NO_LOAD)], dtype=np.uint8)
