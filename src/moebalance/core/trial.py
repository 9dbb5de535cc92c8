"""The fused kernels are tried before a batch is left to them.

A program that Triton compiles wrongly would spoil a run in silence, and one that it cannot compile
would end it. So on a GPU, before the first batch of a kind (device, dtype, gate, E, K), one random
batch goes through the kernels and through torch. Where they differ, torch goes on alone, and a
warning says so. That is once in a process; a batch under a graph's capture is not tried.

T tokens, E experts, K chosen experts per token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moebalance import kernels
from moebalance.core.autograd import Pass, Tally, choose, tie
from moebalance.core.leaves import leaves, refill
from moebalance.core.packing import packed_size
from moebalance.gates import Gate
from moebalance.methods import LossFree, Method, PhiBalancing, Together

logger = logging.getLogger("moebalance")

_ROWS = 4099  # so many that programs are added up in several groups, and no multiple of a block
_FEW = 1e-3  # of the tokens: two roundings of a near tie may choose two experts
_CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def trusted(logits: Float[Tensor, "T E"], gate: Gate, top_k: int) -> bool:
    """Whether the kernels agree with torch on such logits, as far as that can be tried here."""
    if torch.compiler.is_compiling() or logits.device.type != "cuda":
        return True
    if isinstance(logits, FakeTensor):  # shapes alone are asked for
        return True
    if torch.cuda.is_current_stream_capturing():  # a graph waits for no comparison
        return True
    return agree(logits.device, logits.dtype, gate, logits.shape[-1], top_k)


@cache
def agree(
    device: torch.device,
    dtype: torch.dtype,
    gate: Gate,
    num_experts: int,
    top_k: int,
    rows: int = _ROWS,
) -> bool:
    """Whether one random batch gives the same in the kernels and in torch; if not, warn."""
    if not kernels.supported(torch.empty(1, num_experts, device=device, dtype=dtype), gate, top_k):
        return True  # they are not used
    try:
        found = ", ".join(_differing(_Case.drawn(device, dtype, gate, num_experts, top_k, rows)))
    except Exception as error:  # whatever Triton and its compilers raise
        found = f"{type(error).__name__}: {error}"
    if found:
        logger.warning(
            "moebalance: the fused kernels differ from torch on %s for %s logits of %d experts, "
            "top-%d (%s). Torch does their work. Please report this, with your versions of torch "
            "and Triton.",
            device, dtype, num_experts, top_k, found,
        )  # fmt: skip
    return not found


class _Case(NamedTuple):
    """One batch: logits, padding, and the gradient of its weights."""

    logits: Float[Tensor, "T E"]
    mask: Bool[Tensor, "T"]
    upstream: Float[Tensor, "T E"]
    price: Float[Tensor, "E"]
    gate: Gate
    top_k: int

    @staticmethod
    def drawn(
        device: torch.device, dtype: torch.dtype, gate: Gate, experts: int, top_k: int, rows: int
    ) -> _Case:
        random = torch.Generator().manual_seed(0)  # no one's random numbers are touched
        with torch.device("cpu"):
            logits = torch.randn(rows, experts, generator=random, dtype=torch.float32)
            upstream = torch.randn(rows, experts, generator=random, dtype=torch.float32)
            price = 0.3 * torch.randn(experts, generator=random, dtype=torch.float32)
            mask = torch.rand(rows, generator=random) < 0.8
        on = (logits.to(device, dtype), mask.to(device), upstream.to(device), price.to(device))
        return _Case(*on, gate, top_k)


def _differing(case: _Case) -> Iterator[str]:
    """What differs, in words."""
    tolerance = _CLOSE[case.logits.dtype]
    for name, run in (("a router", _routed), ("an attached router", _attached)):
        ours, plain = run(case, fused=True), run(case, fused=False)
        for what, mine, theirs in zip(("weights", "gradient"), ours, plain, strict=False):
            off = ~((mine - theirs).abs() <= tolerance * theirs.abs().max())  # NaN is off
            if off.any(dim=-1).float().mean().item() > _FEW:
                yield f"{what} of {name}"
        mine, theirs = ours[-1], plain[-1]
        experts = case.logits.shape[-1]
        slack = torch.full_like(theirs, 2.0)  # counts: a near tie or two
        slack[:experts] = 1e-3 * theirs[:experts].abs() + 1e-3
        slack[2 * experts :] = 0
        if not bool(((mine - theirs).abs() <= slack).all()):
            yield f"sums of {name}"


def _routed(case: _Case, *, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (T, E), gradient (T, E) and sums of two batches through a router of ours."""
    method = Together(PhiBalancing(), LossFree(scale="nats"))
    state = method.init(case.logits.shape[-1])
    state = (state[0], state[1]._replace(price=case.price))
    how = _pass(case, method, state, fused=fused)

    def batch(logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts = choose(logits, how, mask=case.mask)
        dense = torch.zeros_like(case.upstream).scatter(-1, experts, weights.float())
        return dense, dense

    return _twice(batch, case, how)


def _attached(case: _Case, *, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a router of another's, whose choice stays."""
    method = PhiBalancing()
    how = _pass(case, method, method.init(case.logits.shape[-1]), fused=fused)
    chosen, experts = case.logits.detach().float().topk(case.top_k)
    dense = torch.zeros_like(case.upstream).scatter(-1, experts, chosen.softmax(dim=-1))

    def batch(logits: Tensor) -> tuple[Tensor, Tensor]:
        carrier = dense.clone().requires_grad_()
        return dense, tie(carrier, how, logits=logits, experts=experts, mask=case.mask)

    return _twice(batch, case, how)


def _twice(
    batch: Callable[[Tensor], tuple[Tensor, Tensor]], case: _Case, how: Pass
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        for _ in range(2):  # the second finds the counters as the first left them
            logits = case.logits.clone().requires_grad_()
            weights, carrier = batch(logits)
            (carrier * case.upstream).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return weights.detach(), logits.grad.float(), how.tally.running


def _pass(case: _Case, method: Method, state: Any, *, fused: bool) -> Pass:
    device, experts = case.logits.device, case.logits.shape[-1]
    running = torch.zeros(packed_size(method, experts), device=device, dtype=torch.float32)
    tally = Tally(
        running,
        running.new_zeros(2),
        running.new_ones(()),
        running.new_zeros(()),
        kernels.new_tickets(running),
    )
    state = refill(state, iter([tensor.to(device) for _, tensor in leaves(state)]))
    about = (method, method.traits, case.gate, state, tally, fused)
    return Pass(*about, top_k=case.top_k, normalize=True)
