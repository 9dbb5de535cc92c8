"""Route in a router's place: choose, count and charge in one node of the graph.

Where a router is known to be a linear map and a rule that we have, only its linear map is run, and
our pass does the rest. A price before top-k that the model cannot hold would make the router's own
softmax and top-k useless. A method that only charges needs the scores that they form: there our
pass gives the weights and experts of the router to the bit, in its order (on a GPU, in the fused
kernels, weights to rounding).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moebalance.gates import normalized
from moebalance.integrations.huggingface.conventions import COMMON
from moebalance.integrations.huggingface.probe import NATIVE_BIAS, PLAIN_DTYPES, stand_in
from moebalance.integrations.huggingface.routers import Site

Linear = Callable[[nn.Module, Tensor], Tensor]
_TOKENS = 8


class Form(NamedTuple):
    """What of a router is run in its place.

    Attributes:
        logits: (T, E) from hidden states (…, D), to the bit as the router's own.
        dtype: of its weights; None for the dtype of the logits.
        exact: whether our pass chooses and weighs as the router does, to the bit and in its order.
    """

    logits: Linear
    dtype: torch.dtype | None
    exact: bool


def form_of(site: Site) -> Form | None:
    """How to stand in for this router; None where running it tells that we do not know it all.

    It must hold a weight and perhaps a bias, answer with exactly (logits, weights, experts) by a
    plain rule, and do so for float32 and bfloat16, one sequence and many.
    """
    router = site.router
    weight = getattr(router, "weight", None)
    held = {name for name, _ in (*router.named_parameters(), *router.named_buffers())}
    plain = site.convention is COMMON and site.rule is not None and site.rule.plain_top_k
    if not plain or "forward" in vars(router) or not isinstance(weight, Tensor):
        return None
    if not held <= {"weight", "bias", *NATIVE_BIAS}:
        return None
    if weight.dim() != 2 or weight.dtype not in PLAIN_DTYPES:  # partitioned, or quantised
        return None
    for logits in (_as_it_is, _in_float32):
        try:
            wide, narrow = (_seen(site, logits, d) for d in (torch.float32, torch.bfloat16))
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        if wide is not None and narrow is not None:
            unbiased = site.bias_name is None and held <= {"weight", "bias"}
            exact = unbiased and wide.exact and narrow.exact
            return narrow._replace(exact=exact)
    return None


@torch.no_grad()
def _seen(site: Site, logits: Linear, dtype: torch.dtype) -> Form | None:
    """The form of a router in this dtype, if its answer is what we would say; else None."""
    random = torch.Generator().manual_seed(0)
    twin = stand_in(site.router, random).to(dtype)
    columns = next(p for p in twin.parameters() if p.dim() == 2).shape[1]
    assert site.rule is not None
    exact = True
    for shape in ((_TOKENS, columns), (2, _TOKENS // 2, columns)):
        hidden = torch.randn(shape, generator=random, device="cpu").to(dtype)
        answer: Any = twin(hidden)
        if not isinstance(answer, tuple) or len(answer) != 3:
            return None
        theirs, weights, experts = answer
        found: torch.dtype = weights.dtype
        if not torch.equal(logits(twin, hidden), theirs):
            return None
        if not torch.equal(theirs.topk(site.top_k).indices.sort()[0], experts.sort()[0]):
            return None
        ours = site.rule.weigh(theirs, experts)
        if not torch.allclose(ours, weights.float(), rtol=0.02 if dtype != torch.float32 else 1e-5):
            return None
        values, chosen = site.gate.affinities(theirs).topk(site.top_k, dim=-1)
        values = normalized(values)[0] if site.rule.normalized else values
        ours = (values * site.rule.scaling).to(found)
        exact = exact and torch.equal(chosen, experts) and torch.equal(ours, weights)
    return Form(logits, None if found == dtype else found, exact)


def _as_it_is(router: nn.Module, hidden: Float[Tensor, "*tokens D"]) -> Float[Tensor, "T E"]:
    rows = hidden.reshape(-1, hidden.shape[-1])
    return F.linear(rows, router.weight, getattr(router, "bias", None))  # type: ignore[arg-type]


def _in_float32(router: nn.Module, hidden: Float[Tensor, "*tokens D"]) -> Float[Tensor, "T E"]:
    rows, bias = hidden.reshape(-1, hidden.shape[-1]), getattr(router, "bias", None)
    weight: Any = router.weight
    wide = None if bias is None else bias.type(torch.float32)
    return F.linear(rows.type(torch.float32), weight.type(torch.float32), wide)
