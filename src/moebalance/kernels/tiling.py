"""Which inputs the programs take, and how a block of rows lies in registers.

Shapes: T tokens, E experts, K top-k.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.gates import Gate, GroupLimit, Sigmoid, Softmax

MAX_EXPERTS = 2304
MAX_TOP_K = 32
_MOST_PROGRAMS = 2112
MEMBERS = 32
"""Programs whose sums are added up together; `sums_program.MEMBERS` is the same number."""


def supported(logits: Tensor, gate: Gate, top_k: int) -> bool:
    """Whether the fused router takes these logits; the plain form takes all.

    Conditions:

    - logits (T, E) in float32, bfloat16 or float16, with stride 1 along E;
    - an NVIDIA GPU of compute capability 8.0 or later, with Triton; or Triton's interpreter
      (TRITON_INTERPRET=1);
    - E ≤ 2304, K ≤ 32;
    - a softmax or sigmoid gate;
    - not under torch.compile, which fuses the plain form by itself.

    >>> supported(torch.zeros(4, 8, dtype=torch.float64), Softmax(), 2)
    False
    """
    return (
        not torch.compiler.is_compiling()
        and _runs_on(logits.device)
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and logits.dim() == 2
        and logits.shape[1] <= MAX_EXPERTS
        and top_k <= min(MAX_TOP_K, logits.shape[1])
        and logits.stride(1) == 1
        and type(gate) in (Softmax, Sigmoid)
    )


class Sizes(NamedTuple):
    """Compile-time sizes of a program, by their names there; see `tile_program.py`."""

    stride: int
    num_experts: int
    chunks: int
    step: int
    width: int
    block: int


class Tiling(NamedTuple):
    """How a block of rows lies in the registers of one program; see `tile_program.py`.

    Attributes:
        sizes: compile-time sizes of the programs.
        warps: warps of one program.
        programs: the most programs of a launch that sums.
    """

    sizes: Sizes
    warps: int
    programs: int

    @property
    def options(self) -> dict[str, Any]:
        """Compile-time arguments of a `Program`."""
        return {**self.sizes._asdict(), "num_warps": self.warps, "enable_fp_fusion": True}

    def blocks(self, rows: int) -> int:
        """Number of blocks that hold all rows."""
        return -(-rows // self.sizes.block)


def tile(logits: Float[Tensor, "T E"], limit: GroupLimit | None = None, *, sums: bool) -> Tiling:
    """Lay out a block of rows: 8 to 64 logits in a thread; whole rows in a warp up to E = 1024.

    Few warps and many programs were fastest on an H200 (`benchmarks/tiles.py`).

    Args:
        logits: (T, E); only shape, strides and dtype matter.
        limit: as given to `router.choose`.
        sums: whether the program also holds sums, and should hold fewer rows.
    """
    stride, offset = logits.stride(0), int(logits.storage_offset())
    # Logits in one load of a thread: 16 bytes, or less if the rows' alignment is lower.
    vector = min(16 // logits.itemsize, _two_power_in(stride), _two_power_in(offset))
    return _tile(logits.shape[1], stride, vector, limit, sums)


@cache
def _tile(
    num_experts: int, stride: int, vector: int, limit: GroupLimit | None, sums: bool
) -> Tiling:
    if limit is None:
        columns = next_power(num_experts)
        warps = 2
        width = step = min(columns, 32 * vector * (1 if columns <= 1024 else warps))
        chunks = columns // width
    else:
        step = num_experts // limit.groups
        chunks, width = next_power(limit.groups), next_power(step)
        columns = chunks * width
        warps = 4 if columns <= 1024 else 8
        vector = 1
    per_thread = 16 if sums or columns > 64 else 8
    whole = warps * max(1, 32 * vector // width) if columns <= 1024 else 1
    block = max(whole, warps * 32 * per_thread // columns)
    sizes = Sizes(stride, num_experts, chunks, step, width, block)
    return Tiling(sizes, warps, _MOST_PROGRAMS if columns <= 512 else 528)


class Sums(NamedTuple):
    """Memory in which a launch adds up what its programs sum.

    Attributes:
        programs: how many programs.
        partials: (programs + groups, 2E + 2), their rows, and those of groups of them.
        packed: (2E + 2,), where the sums arrive.
        tickets: int32, 0 before and after; `sums_program.ticket`.
    """

    programs: int
    partials: Float[Tensor, "rows sums"]
    packed: Float[Tensor, "sums"]
    tickets: Int[Tensor, "counters"]


def sums_of(logits: Float[Tensor, "T E"], tiling: Tiling, tickets: Tensor | None) -> Sums:
    """Memory for the sums of a launch over these logits."""
    rows, num_experts = logits.shape
    programs = max(1, min(tiling.blocks(rows), tiling.programs))
    lines = programs + -(-programs // MEMBERS)
    partials = logits.new_empty(lines, 2 * num_experts + 2, dtype=torch.float32)
    packed = logits.new_empty(2 * num_experts + 2, dtype=torch.float32)
    return Sums(programs, partials, packed, new_tickets(logits) if tickets is None else tickets)


def new_tickets(like: Tensor) -> Int[Tensor, "counters"]:
    """Counters by which the programs of a launch know the last of them: for all, and a group."""
    return like.new_zeros(1 + -(-_MOST_PROGRAMS // MEMBERS), dtype=torch.int32)


def added(num_experts: int, numbers: int) -> dict[str, int]:
    """Lines and columns of the numbers that `sums_program.join` loads at a time."""
    columns = min(256, next_power(2 * num_experts + 2))
    return {"columns": columns, "lines": min(MEMBERS, numbers // columns)}


def row_of(values: Float[Tensor, "E"] | None, logits: Tensor) -> Tensor:
    """Values (E,) as float32. Without values any tensor stands in; it is never read."""
    return logits if values is None else values.detach().float().contiguous()


def bytes_of(mask: Bool[Tensor, "T"] | None, logits: Tensor) -> Tensor:
    """A mask (T,) as bytes. Without a mask any tensor stands in; it is never read."""
    return logits if mask is None else mask.contiguous().view(torch.uint8)


@cache
def _runs_on(device: torch.device) -> bool:
    if find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def next_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _two_power_in(n: int) -> int:
    """The largest power of two that divides n, 16 for 0."""
    return n & -n if n else 16
