"""Route in a router's place: choose, count and charge in one node of the graph.

Where a router is known to be a linear map and a rule that we have, only its linear map is run, and
our pass does the rest. A price before top-k that the model cannot hold would make the router's own
softmax and top-k useless. A method that only charges needs the scores that they form: there our
pass gives the weights and experts of the router to the bit, in its order (on a GPU, in the fused
kernels, weights to rounding).
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

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
_TRIED: dict[Hashable, "Form | None"] = {}


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


class _Probe(NamedTuple):
    """One call of a router's code.

    Attributes:
        twin: what was called, with random weights.
        hidden: (…, D), what it was called on.
        autocast: whether under autocast to bfloat16.
        logits: (T, E), the answer.
        weights: (T, K), the answer.
        experts: (T, K), the answer.
    """

    twin: nn.Module
    hidden: Tensor
    autocast: bool
    logits: Tensor
    weights: Tensor
    experts: Tensor


def form_of(site: Site) -> Form | None:
    """How to stand in for this router; None where running it tells that we do not know it all.

    It must hold a weight and perhaps a bias, answer with exactly (logits, weights, experts) by a
    plain rule, and do so for float32 and bfloat16, under autocast, one sequence and many. Of
    routers that are alike, as those of a model's layers are, one is tried.
    """
    if not _is_plain(site):
        return None
    kind = _kind(site)
    if kind not in _TRIED:
        _TRIED[kind] = _try(site)
    return _TRIED[kind]


def _kind(site: Site) -> Hashable:
    """All that may tell a router's arithmetic from another's, but for the values of its weights."""
    router = site.router
    numbers = {k: v for k, v in vars(router).items() if isinstance(v, bool | int | float | str)}
    numbers.pop("training", None)
    shape = tuple(cast(Tensor, router.weight).shape)
    held = frozenset(_held(site))
    told = site.rule, site.gate, site.top_k, site.bias_name
    return type(router), type(router).forward, tuple(sorted(numbers.items())), shape, held, told


def _try(site: Site) -> Form | None:
    """Run the router's code, and compare."""
    try:
        probes = _probes(site.router)
        linears = [linear for linear in _LINEARS if all(_gives(linear, p) for p in probes)]
        known = bool(linears) and all(_follows(site, p) for p in probes)
        exact = known and _held(site) <= {"weight", "bias"} and site.bias_name is None
        exact = exact and all(_is_exact(site, p) for p in probes)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    dtypes = [
        d
        for d in (None, torch.float32)
        if all(p.weights.dtype == (d or p.logits.dtype) for p in probes)
    ]
    return Form(linears[0], dtypes[0], exact) if known and dtypes else None


def _is_plain(site: Site) -> bool:
    """Whether the router may be a linear map and a rule, as far as one sees without running it."""
    weight = getattr(site.router, "weight", None)
    plain = site.convention is COMMON and site.rule is not None and site.rule.plain_top_k
    if not plain or "forward" in vars(site.router) or not isinstance(weight, Tensor):
        return False
    if not _held(site) <= {"weight", "bias", *NATIVE_BIAS}:
        return False
    return weight.dim() == 2 and weight.dtype in PLAIN_DTYPES  # else partitioned, or quantised


def _held(site: Site) -> set[str]:
    """Names of the router's tensors."""
    router = site.router
    return {name for name, _ in (*router.named_parameters(), *router.named_buffers())}


@torch.no_grad()
def _probes(router: nn.Module) -> list[_Probe]:
    """Call the router's code on random tokens, in every way that may change its arithmetic.

    Raises:
        TypeError: it answers with something else than three tensors.
    """
    random = torch.Generator().manual_seed(0)
    found = []
    for dtype, autocast in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        twin = stand_in(router, random).to(dtype)
        width: int = twin.weight.shape[1]  # type: ignore[assignment, index]
        for shape in ((_TOKENS, width), (2, _TOKENS // 2, width)):
            # Logits of order one at any width: no affinity underflows, and few are equal.
            hidden = torch.randn(shape, generator=random, device="cpu") / width**0.5
            hidden = hidden.to(dtype)
            with _autocast(autocast):
                answer: Any = twin(hidden)
            if not isinstance(answer, tuple):
                raise TypeError(f"{type(answer).__name__} is no answer of a plain router")
            found.append(_Probe(twin, hidden, autocast, *answer))
    return found


@torch.no_grad()
def _gives(linear: Linear, probe: _Probe) -> bool:
    """Whether a linear map gives the router's logits, also in their dtype."""
    with _autocast(probe.autocast):
        ours = linear(probe.twin, probe.hidden)
    return ours.dtype == probe.logits.dtype and torch.equal(ours, probe.logits)


@torch.no_grad()
def _follows(site: Site, probe: _Probe) -> bool:
    """Whether the site's rule gives the same answer."""
    assert site.rule is not None
    best = probe.logits.topk(site.top_k).indices
    if not torch.equal(best.sort()[0], probe.experts.sort()[0]):
        return False
    ours = site.rule.weigh(probe.logits, probe.experts)
    rtol = 1e-5 if probe.logits.dtype == probe.weights.dtype == torch.float32 else 0.02
    return torch.allclose(ours, probe.weights.float(), rtol=rtol)


@torch.no_grad()
def _is_exact(site: Site, probe: _Probe) -> bool:
    """Whether our pass would give the answer to the bit, in its order."""
    assert site.rule is not None
    with _autocast(probe.autocast):
        values, chosen = site.gate.affinities(probe.logits).topk(site.top_k, dim=-1)
        values = normalized(values)[0] if site.rule.normalized else values
        ours = (values * site.rule.scaling).to(probe.weights.dtype)
    return torch.equal(chosen, probe.experts) and torch.equal(ours, probe.weights)


def _autocast(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def _as_it_is(router: nn.Module, hidden: Float[Tensor, "*tokens D"]) -> Float[Tensor, "T E"]:
    rows = hidden.reshape(-1, hidden.shape[-1])
    return F.linear(rows, router.weight, getattr(router, "bias", None))  # type: ignore[arg-type]


def _in_float32(router: nn.Module, hidden: Float[Tensor, "*tokens D"]) -> Float[Tensor, "T E"]:
    rows, bias = hidden.reshape(-1, hidden.shape[-1]), getattr(router, "bias", None)
    weight: Any = router.weight
    wide = None if bias is None else bias.type(torch.float32)
    return F.linear(rows.type(torch.float32), weight.type(torch.float32), wide)


def _outside_autocast(
    router: nn.Module, hidden: Float[Tensor, "*tokens D"]
) -> Float[Tensor, "T E"]:
    with torch.autocast(hidden.device.type, enabled=False):
        return _in_float32(router, hidden)


_LINEARS: tuple[Linear, ...] = (_as_it_is, _in_float32, _outside_autocast)
