"""Which routers of a model a method balances: routers that train, and that give it a lever."""

import logging
from collections.abc import Iterator, Sequence

from torch import nn
from transformers import PreTrainedModel

from moebalance.integrations.huggingface.routers import (
    Candidate,
    Site,
    Survey,
    examine,
    survey,
)
from moebalance.integrations.names import Layers, chosen
from moebalance.methods import Method, inner_methods, recommended
from moebalance.methods.base import refuse_frozen

logger = logging.getLogger("moebalance")


def choose_sites(
    model: nn.Module, method: Method | None, layers: Layers | None = None
) -> tuple[list[Site], Method]:
    """Recognise the routers that `method` balances in this model, and settle the method.

    Frozen routers are left out where others train, and so are copies that belong to PEFT adapters
    not in use. One line says how many.

    Args:
        model: a Transformers model, wrapped or not.
        method: the method; None if it is to be `recommended` for the routers.
        layers: which routers, by name; None for all.

    Returns:
        The routers, none where the model has none, and the method.

    Raises:
        ValueError: a router of an unknown kind, one that gives the method no lever, or all frozen
            under a method that needs their gradient.
    """
    found = survey(model)
    if not found.routers:
        return [], method or recommended()
    names = set(chosen([router.name for router in found.routers], layers))
    wanted = [router for router in found.routers if router.name in names]
    watched = method is not None and _only_watches(method)
    kept = wanted if watched else _learning(model, wanted)
    frozen = [router.name for router in wanted if router not in kept]
    _say_what_is_left_out(found, frozen, layers)
    sites = [examine(model, router) for router in kept]
    method = _suited(sites) if method is None else method
    for site in sites:
        check_levers(site, method)
    return sites, method


def _suited(sites: Sequence[Site]) -> Method:
    """The recommended method, in the form that these routers allow."""
    native = all(site.bias is not None for site in sites)
    return recommended(native_bias=native, choosable=not any(site.why_fixed for site in sites))


def check_levers(site: Site, method: Method) -> None:
    """Refuse a method that this router gives no lever to, or that knows too little of it.

    Raises:
        ValueError: the choice cannot be replaced and there is no bias; the router is frozen; or
            equal use of all its experts would be wrong, and that is what the method aims at.
    """
    if site.convention.why_shares and not _knows_shares(method):
        raise ValueError(
            f"{site.name} ({type(site.router).__name__}) cannot be balanced by {method!r}: "
            f"{site.convention.why_shares}. Say what part of the load each of its "
            f"{site.num_experts} columns is to have, the ones that compute nothing last: "
            "NegativeEntropy().relative_to(shares) in φ-balancing, proportions=… in other methods."
        )
    native = method.traits.has_selection_price and site.bias is not None
    if method.traits.selects and not native and site.why_fixed:
        raise ValueError(
            f"{method!r} chooses experts, but {site.name} ({type(site.router).__name__}) "
            f"{site.why_fixed}, and no selection bias of its own holds this method's price: use a "
            "method that charges in the loss, such as PhiBalancing."
        )
    refuse_frozen(site.name, method, trains=site.trainable)


def parts(method: Method) -> Iterator[Method]:
    """A method without parts, or the innermost parts of one that is composed."""
    inner = inner_methods(method)
    if not inner:
        yield method
    for each in inner:
        yield from parts(each)


def _knows_shares(method: Method) -> bool:
    """Whether every part of a method that balances aims at given shares."""
    return all(part.traits.aim is not None or not part.traits.balances for part in parts(method))


def _only_watches(method: Method) -> bool:
    return not (method.traits.charges or method.traits.selects)


def _learning(model: nn.Module, routers: Sequence[Candidate]) -> Sequence[Candidate]:
    """The routers that train; where none does, those of the models in which anything trains."""
    learning = [router for router in routers if router.learns]
    if learning:
        return learning
    roots = [
        name
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and any(parameter.requires_grad for parameter in module.parameters())
    ]
    inside = [r for r in routers if any(r.name.startswith(f"{n}." if n else "") for n in roots)]
    return inside or routers


def _say_what_is_left_out(found: Survey, frozen: Sequence[str], layers: Layers | None) -> None:
    reasons = []
    if frozen:
        reasons.append(f"{len(frozen)} frozen (first: {frozen[0]})")
    if found.idle:
        reasons.append(f"{len(found.idle)} of adapters that are not active ({found.idle[0]})")
    if reasons:
        total = len(found.routers) + len(found.idle)
        logger.warning(
            "moebalance: left out %d of %d routers, which do not train: %s.",
            len(frozen) + len(found.idle),
            total,
            "; ".join(reasons),
        )
    if found.by_table:
        logger.info(
            "moebalance: %s and %d more route by a fixed table and are left alone.",
            found.by_table[0],
            len(found.by_table) - 1,
        )
    if found.unrouted and layers is None:
        logger.warning(
            "moebalance: %d MoE blocks have no router that is recognised and stay unbalanced "
            "(first: %s), next to %d routers that are. A router must be a module of its own whose "
            "class is named …Router or …Gate, with top_k and a weight of one row an expert; or "
            "use moebalance.BalancedRouter. To leave these blocks out silently, give "
            "attach(…, layers=…).",
            len(found.unrouted),
            found.unrouted[0] or "the model itself",
            len(found.routers),
        )
