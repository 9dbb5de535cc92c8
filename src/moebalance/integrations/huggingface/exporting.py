"""A trained selection price leaves with the model's weights, or its export is refused.

Methods that price selection (LossFree, QuantileBalancing and what is composed with them) train the
experts under that price. Loaded without it, the model sends tokens to experts that have not learnt
them. The price leaves in the model's own selection bias, as −price. A family without one has no
place for it, and no family has one for a price in nats.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from moebalance.core.handle import Balancing
from moebalance.integrations.huggingface.routers import Site, find_sites, transformers_model
from moebalance.integrations.huggingface.scan import open_weights
from moebalance.methods.base import price_in_force

logger = logging.getLogger("moebalance")

USUAL_RATE = 1e-3
"""Loss-free balancing's usual price step, the yardstick for rounding."""


class Rounding(NamedTuple):
    """What a dtype does to a bias.

    Attributes:
        step: distance of neighbouring numbers at the bias's largest magnitude.
        error: largest difference between the bias and what the dtype makes of it.
    """

    step: float
    error: float


def export(model: nn.Module, balancing: Balancing, folder: str | Path, **options: Any) -> Path:
    """Detach with the price kept in the model, `save_pretrained`, and read the folder back.

    Args:
        model: what was attached to, or merged since; a PEFT model saves its adapter.
        balancing: its handle, of no use afterwards.
        folder: where to save.
        options: for `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: the model has no place for the price (see `check_export`); nothing is done.
        RuntimeError: the folder does not hold the price although the model does.
    """
    check_export(model, balancing)
    sites = _priced(_own_sites(model, balancing), balancing)
    balancing.detach(keep_price=bool(sites))
    saver = _saver(model)
    saver.save_pretrained(folder, **options)

    weights = open_weights(_written(saver, Path(folder)))
    for site in sites:
        bias = cast(Tensor, site.bias).detach().cpu().reshape(-1)
        stored = weights.bias(site)
        if stored is None or not torch.equal(stored.reshape(-1).to(bias.dtype), bias):
            raise RuntimeError(
                f"{folder} was saved without the trained selection bias of {site.name}: do not use "
                "it. Its save_pretrained drops or changes the bias; please report the family."
            )
    return Path(folder)


def check_export(model: nn.Module, balancing: Balancing) -> None:
    """Refuse to save a model whose trained selection price its weights would not hold.

    Nothing to check for a method without a selection price, or before the first step. A bias of
    low precision is no reason to refuse; taking the weights warns about it (`guard_saving`).

    Raises:
        ValueError: a router has no selection bias, the file to be written would not have it, or
            `balancing` belongs to another model.
    """
    sites = _priced(_own_sites(model, balancing), balancing)
    outside = [site.name for site in sites if site.name in balancing.price_outside]
    if outside:
        raise ValueError(_without_slot(balancing, outside) + " " + _WITHOUT_SLOT_REMEDY)
    saved = _saved(_saver(model))
    unsaved = [site.name for site in sites if not _among(cast(Tensor, site.bias), saved)]
    if unsaved:
        raise ValueError(_unsaved(balancing, unsaved))


def guard_saving(
    model: PreTrainedModel, balancing: Balancing, sites: Sequence[Site]
) -> Callable[[], None]:
    """Warn once about weights taken from `model` that lack its selection price, or round it.

    `save_pretrained` and a trainer's `save_model` are not ours to refuse, and a checkpoint to
    resume from is whole with the balancing state next to it; but both ask the model for its
    `state_dict`, where torch lets one listen. Returns the undo.
    """
    told: set[str] = set()
    # partial: torch marks the hook, and a bound method cannot be marked.
    hook = partial(_after_state_dict, balancing, sites, told)
    removal: Callable[[], None] = model.register_state_dict_post_hook(hook).remove  # type: ignore[no-untyped-call]
    return removal


def rounding(bias: Float[Tensor, "E"], dtype: torch.dtype) -> Rounding:
    """What keeping `bias` in `dtype` costs.

    >>> rounding(torch.tensor([0.0, 0.8]), torch.bfloat16).step
    0.00390625
    """
    exact = bias.detach().double()
    largest = exact.abs().max().item()
    if largest == 0:
        return Rounding(0.0, 0.0)
    step = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest))
    return Rounding(step, (exact.to(dtype).double() - exact).abs().max().item())


def _after_state_dict(
    balancing: Balancing,
    sites: Sequence[Site],
    told: set[str],
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
) -> None:
    for kind, message in _hazards(balancing, sites, model, state):
        if kind not in told:
            told.add(kind)
            logger.warning(message)


def _hazards(
    balancing: Balancing, sites: Sequence[Site], model: nn.Module, state: dict[str, Any]
) -> list[tuple[str, str]]:
    priced = _priced(sites, balancing)
    outside = [site.name for site in priced if site.name in balancing.price_outside]
    if outside:
        return [("outside", f"moebalance: {_without_slot(balancing, outside)}")]
    if hasattr(model, "peft_config"):  # gone again after merge_and_unload
        extra = {key: value for key, value in state.items() if ".modules_to_save." in key}
        unsaved = [s.name for s in priced if s.bias is not None and not _among(s.bias, extra)]
        if unsaved:
            return [("unsaved", f"moebalance: {_unsaved(balancing, unsaved)}")]
    told = _rounded(balancing, priced)
    return [("rounded", told)] if told else []


def _own_sites(model: nn.Module, balancing: Balancing) -> list[Site]:
    """The balanced routers of `model`, under the handle's names for them.

    An adapter may have been merged since `attach`: the names are then shorter in the model.
    """
    plain = balancing.plain
    found = {plain(site.name): site for site in find_sites(model)}
    missing = sorted(name for name in balancing.layers if plain(name) not in found)
    if missing:
        raise ValueError(
            f"This handle balances {missing[0]} ({len(missing)} such routers), which "
            f"{type(model).__name__} does not have: give the module that was attached to, or what "
            "merge_and_unload made of it."
        )
    return [replace(found[plain(name)], name=name) for name in balancing.layers]


def _priced(sites: Sequence[Site], balancing: Balancing) -> list[Site]:
    """The sites under a price that changes the choice: one that differs between experts."""
    found = []
    for site in sites:
        layer = balancing.layers.get(site.name)
        price = None if layer is None else price_in_force(layer.method, layer.state)[0]
        if price is not None and bool(price.max() > price.min()):
            found.append(site)
    return found


def _rounded(balancing: Balancing, sites: Sequence[Site]) -> str:
    """The warning about a bias of low precision; empty if there is none."""
    worst: tuple[Rounding, Site] | None = None
    for site in sites:
        bias, price = site.bias, balancing.layers[site.name].price
        if bias is None or price is None or bias.dtype not in (torch.bfloat16, torch.float16):
            continue
        found = rounding(-price, bias.dtype)
        if worst is None or found.step > worst[0].step:
            worst = found, site
    if worst is None:
        return ""
    (step, error), site = worst
    kind = str(cast(Tensor, site.bias).dtype).removeprefix("torch.")
    return (
        f"moebalance: the selection bias of {site.name} is {kind}. Its price is rounded to steps "
        f"of {step:.2g}, {step / USUAL_RATE:.2g} times loss-free's usual update of {USUAL_RATE:g}; "
        f"the largest error is {error:.2g}. Keep this one tensor in float32: "
        "`bias.data = bias.data.float()` before attaching."
    )


def _without_slot(balancing: Balancing, names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{balancing.method!r} trained a selection price, and the weights of {names[0]}{more} do "
        "not hold it: that takes a price in affinities, and a selection bias of the model's own. "
        "These weights alone send tokens to other experts than in training, wherever they are "
        "loaded."
    )


_WITHOUT_SLOT_REMEDY = (
    "To export a model, train it with a method that charges in the loss, such as PhiBalancing. To "
    "evaluate this one, save the balancing state (moebalance.huggingface.save) and attach again."
)


def _unsaved(balancing: Balancing, names: Sequence[str]) -> str:
    return (
        f"{balancing.method!r} trained a selection price, and the selection bias that holds it "
        f"is not among what would be saved of {', '.join(names[:1])} (and {len(names) - 1} more). "
        "An adapter holds what it trains: merge it (merge_and_unload) and save the whole model, or "
        "name the router in modules_to_save."
    )


def _among(bias: Tensor, saved: dict[str, Any]) -> bool:
    """Whether a state dict holds this very tensor."""
    return any(
        isinstance(tensor, Tensor) and tensor.data_ptr() == bias.data_ptr()
        for tensor in saved.values()
    )


def _saver(model: nn.Module) -> Any:
    """The module to call `save_pretrained` of: PEFT's wrapper, or the Transformers model."""
    return model if _is_peft(model) else transformers_model(model)


def _saved(saver: Any) -> dict[str, Any]:
    """What `save_pretrained` writes: of a model with an adapter, that alone."""
    if _is_peft(saver):
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(saver, adapter_name=saver.active_adapters[0]))
    if getattr(saver, "_hf_peft_config_loaded", False):  # by Transformers' own add_adapter
        return dict(saver.get_adapter_state_dict())
    return dict(saver.state_dict())


def _written(saver: Any, folder: Path) -> Path:
    """Where `save_pretrained` writes: PEFT gives an adapter a folder, but not the default one."""
    name = saver.active_adapters[0] if _is_peft(saver) else "default"
    return folder if name == "default" else folder / name


def _is_peft(model: nn.Module) -> bool:
    """Whether PEFT is around the model, and not only in it."""
    return not isinstance(model, PreTrainedModel) and hasattr(model, "peft_config")
