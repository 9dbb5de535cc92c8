"""Launching the fused router: one pass forward, one pass backward, nothing (T, E) in between.

    forward   z → weights (T, K), experts (T, K), normaliser (T,), packed sums (2E + 2,)
    backward  ∂/∂z of ⟨g, weights⟩ + ⟨q, Σ_t p_t⟩,   p ∘ (q − ⟨p, q⟩) ∘ a'(z) and the weights' own

The forward pass reads the logits once, the backward pass reads them and writes their gradient:
three times the logits' bytes in all, which is the least for a router that keeps only its logits.
The sums are there before the backward pass needs a price, so that a price may depend on them.

Sums are deterministic: each program adds its rows in order into its own row of a small table, and
torch adds up the table. The number of programs depends on shapes alone, not on the device.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moebalance.kernels.launch import launch
from moebalance.kernels.plain import Chosen, Groups
from moebalance.routing import Gate, Sigmoid, Softmax

MAX_EXPERTS = 2304
MAX_TOP_K = 32


def supported(logits: Tensor, gate: Gate, top_k: int) -> bool:
    """Whether the fused router can take these logits; the plain form takes all.

    Wanted are rows (T, E) of float32, bfloat16 or float16 with neighbouring experts side by side,
    on an NVIDIA GPU of compute capability 8.0 or later (or Triton's interpreter, with
    TRITON_INTERPRET=1); E ≤ 2304, K ≤ 32; a softmax or sigmoid gate; and Triton. Not under
    torch.compile, which fuses the plain form by itself.

    >>> supported(torch.zeros(4, 8, dtype=torch.float64), Softmax(), 2)
    False
    """
    return (
        logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and logits.dim() == 2
        and logits.shape[1] <= MAX_EXPERTS
        and top_k <= min(MAX_TOP_K, logits.shape[1])
        and logits.stride(1) == 1
        and type(gate) in (Softmax, Sigmoid)
        and not torch.compiler.is_compiling()
        and _runs_on(logits.device)
    )


def choose(
    logits: Float[Tensor, "T E"],
    gate: Gate,
    top_k: int,
    *,
    normalize: bool,
    price: Float[Tensor, "E"] | None = None,
    groups: Groups | None = None,
    mask: Bool[Tensor, "T"] | None = None,
) -> Chosen:
    """Choose experts, weigh them and sum what was done, in one pass over the logits.

    Experts are ranked by their affinity minus the price, or by their logit where there is neither
    price nor a limit to groups. Of equals the lowest index wins. NaN ranks above all numbers, so
    that a broken row still names K experts, and shows in the sums.

    Args:
        logits: (T, E), as `supported` wants them.
        gate: `Softmax()` or `Sigmoid()`.
        top_k: K.
        normalize: whether the weights of a token are divided by their sum; else affinities.
        price: (E,), subtracted from the affinities before top-k, never from the weights.
        groups: limits the choice to the best groups; a group is E / count neighbours.
        mask: (T,) True for real tokens. Padded rows are routed but not summed.

    Raises:
        ValueError: K out of 1..E, or groups that E, K or their own numbers do not fit.
    """
    rows, num_experts = logits.shape
    _check(num_experts, top_k, groups)
    groups = groups if groups is not None and groups.limit else None
    weights = logits.new_empty(rows, top_k)
    experts = logits.new_empty(rows, top_k, dtype=torch.int64)
    normaliser = logits.new_empty(rows, dtype=torch.float32)
    tiling = tile(logits, top_k, groups, ranks=True)
    programs = max(1, min(tiling.blocks(rows), tiling.programs))
    partials = logits.new_empty(programs, 2 * num_experts + 2, dtype=torch.float32)
    launch(
        "programs.choose",
        logits.device,
        programs,
        logits,
        _row(price, logits),
        _bytes(mask, logits),
        weights,
        experts,
        normaliser,
        partials,
        rows,
        0,
        **tiling.options,
        sigmoid=isinstance(gate, Sigmoid),
        normalize=normalize,
        has_price=price is not None,
        has_mask=mask is not None,
        kept=0 if groups is None else groups.kept,
        best=1 if groups is None else groups.best,
    )
    return Chosen(weights, experts, normaliser, partials.sum(dim=0))


def pull_back(
    upstream: Float[Tensor, "T K"],
    logits: Float[Tensor, "T E"],
    chosen_experts: Int[Tensor, "T K"],
    normaliser: Float[Tensor, "T"],
    gate: Gate,
    *,
    normalize: bool,
    charge: Float[Tensor, "E"] | None = None,
    mask: Bool[Tensor, "T"] | None = None,
) -> Float[Tensor, "T E"]:
    """Gradient of the logits, of the weights and of the charge, in one pass.

    Args:
        upstream: (T, K) gradient of the loss with respect to the weights.
        logits: (T, E), as given to `choose`.
        chosen_experts: (T, K), as `choose` returned them.
        normaliser: (T,), as `choose` returned it.
        gate: as given to `choose`.
        normalize: as given to `choose`.
        charge: q (E,), gradient of the loss with respect to Σ_t p_t over real tokens: price times
            strength · E / tokens · scale of the loss. None for none.
        mask: (T,) as given to `choose`; padded rows are charged nothing.

    Returns:
        (T, E), contiguous, in the logits' dtype.
    """
    rows, num_experts = logits.shape
    gradient = logits.new_empty(rows, num_experts)
    tiling = tile(logits, chosen_experts.shape[1], ranks=False)
    if rows:
        launch(
            "programs.pull_back",
            logits.device,
            tiling.blocks(rows),
            upstream.contiguous(),
            logits,
            normaliser,
            chosen_experts,
            _row(charge, logits),
            _bytes(mask, logits),
            gradient,
            rows,
            **tiling.options,
            sigmoid=isinstance(gate, Sigmoid),
            normalize=normalize,
            has_charge=charge is not None,
            has_mask=mask is not None,
        )
    return gradient


class Tiling(NamedTuple):
    """How a block of rows lies in the registers of one program; see `programs.py`.

    Attributes:
        sizes: the programs' compile-time sizes.
        warps: warps of one program.
        programs: most programs of a launch that sums.
    """

    sizes: dict[str, int]
    warps: int
    programs: int

    @property
    def options(self) -> dict[str, Any]:
        """What a launch is given of it."""
        return {**self.sizes, "num_warps": self.warps, "enable_fp_fusion": True}

    def blocks(self, rows: int) -> int:
        """Number of blocks that hold all rows."""
        return -(-rows // self.sizes["block"])


def tile(
    logits: Float[Tensor, "T E"], top_k: int, groups: Groups | None = None, *, ranks: bool
) -> Tiling:
    """Lay out a block of rows: 8 to 32 logits a thread, and whole rows in a warp up to E = 1024.

    Args:
        logits: (T, E), of which shape, strides and dtype matter.
        top_k: K.
        groups: as given to `choose`.
        ranks: whether the program holds keys and sums beside the logits, and should hold few rows.
    """
    num_experts, stride = logits.shape[1], logits.stride(0)
    # What one thread loads at once: 16 bytes, or as much as the rows' alignment allows.
    vector = min(16 // logits.itemsize, _two_power_in(stride))
    vector = min(vector, _two_power_in(int(logits.storage_offset())))
    if groups is None:
        columns = _next_power(num_experts)
        warps = 4 if columns <= 1024 else 8
        width = step = min(columns, 32 * vector * (1 if columns <= 1024 else warps))
        chunks = columns // width
    else:
        step = num_experts // groups.count
        chunks, width = _next_power(groups.count), _next_power(step)
        columns = chunks * width
        warps = 4 if columns <= 1024 else 8
        vector = 1
    per_thread = 8 if columns <= (256 if ranks else 64) else 16
    whole = warps * max(1, 32 * vector // width) if columns <= 1024 else 1
    sizes = {
        "stride": stride,
        "num_experts": num_experts,
        "top_k": top_k,
        "chunks": chunks,
        "step": step,
        "width": width,
        "block": max(whole, warps * 32 * per_thread // columns),
        "slots": _next_power(top_k),
    }
    return Tiling(sizes, warps, 1056 if columns <= 512 else 528)


def _check(num_experts: int, top_k: int, groups: Groups | None) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k}: must lie in 1..{num_experts}, the number of experts.")
    if groups is None:
        return
    count, kept, best = groups.count, groups.kept, groups.best
    if count < 1 or num_experts % count:
        raise ValueError(f"{groups}: {num_experts} experts do not fall into {count} equal groups.")
    size = num_experts // count
    if not (1 <= kept <= count and 1 <= best <= size and top_k <= kept * size):
        raise ValueError(
            f"{groups} with top_k={top_k}: kept must lie in 1..{count}, best in 1..{size}, and "
            f"top_k within the {size} experts of each kept group."
        )


def _row(values: Float[Tensor, "E"] | None, logits: Tensor) -> Tensor:
    """A row of float32; any tensor stands in for none, which is never read."""
    return logits if values is None else values.detach().float().contiguous()


def _bytes(mask: Bool[Tensor, "T"] | None, logits: Tensor) -> Tensor:
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


def _next_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _two_power_in(n: int) -> int:
    """The largest power of two that divides n, 16 for 0."""
    return n & -n if n else 16
