"""A balancing state next to a checkpoint, compared with the weights there."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moebalance.integrations.huggingface.routers import Site
from moebalance.integrations.huggingface.scan import Weights
from moebalance.integrations.huggingface.state_file import STATE_FILE, read
from moebalance.lab.console import counted
from moebalance.lab.doctor.weights import Finding, Severity, and_more


class State(NamedTuple):
    """A balancing state next to a checkpoint.

    Attributes:
        method: the method and its parameters.
        steps: optimizer steps taken.
        prices: selection price (E,) of each router that has one, by the router's name.
        routers: names of all routers.
        finite: whether every tensor is.
    """

    method: str
    steps: int
    prices: dict[str, Tensor]
    routers: tuple[str, ...]
    finite: bool


def read_state(folder: Path) -> State | None:
    """Read a balancing state; None if there is no file.

    Raises:
        ValueError: the file is damaged or was not written by moebalance.
    """
    if not (folder / STATE_FILE).is_file():
        return None
    saved = read(folder)
    layers: dict[str, dict[str, Tensor]] = saved["layers"]
    prices = {
        name: tensor
        for name, layer in layers.items()
        for key, tensor in layer.items()
        if key.endswith("price")
    }
    finite = all(
        torch.isfinite(t).all().item() for layer in layers.values() for t in layer.values()
    )
    return State(saved["method_repr"], saved["steps"], prices, tuple(layers), finite)


def check_state(state: State, sites: Sequence[Site], weights: Weights) -> list[Finding]:
    """Compare a balancing state with the model and with the weights next to it."""
    about = f"Balanced by {state.method} for {counted(state.steps, 'step')}"
    if not state.finite:
        return [Finding(Severity.ERROR, f"{about}; the state has NaN or infinite values.")]
    if {_bare(name) for name in state.routers} != {_bare(site.name) for site in sites}:
        return [
            Finding(
                Severity.ERROR,
                f"{about}, but the state is of other routers ({and_more(state.routers)}).",
                "Put the state next to the checkpoint that it was saved with.",
            )
        ]
    findings = [Finding(Severity.OK, f"{about}; the state is of these routers.")]
    prices = {_bare(name): price for name, price in state.prices.items()}
    priced = [s for s in sites if _bare(s.name) in prices and _matters(prices[_bare(s.name)])]
    homeless = [site.name for site in priced if site.bias_name is None]
    if homeless:
        findings.append(
            Finding(
                Severity.WARNING,
                f"The trained selection price of {and_more(homeless)} is in the balancing state "
                "only, for this family has no selection bias: the weights alone route otherwise "
                "than in training.",
                "Resume with moebalance; for a model to be exported, use a loss-lever method such "
                "as PhiBalancing.",
            )
        )
    dropped = [
        site.name
        for site in priced
        if site.bias_name is not None and not _holds(site, prices[_bare(site.name)], weights)
    ]
    if dropped:
        findings.append(
            Finding(
                Severity.ERROR,
                f"The weights do not hold the selection price that was trained for "
                f"{and_more(dropped)}: saved without it, they route otherwise than in training.",
                "Load the model, attach the same method, load the state "
                "(moebalance.huggingface.load), and save with moebalance.huggingface.export.",
            )
        )
    return findings


def _holds(site: Site, price: Tensor, weights: Weights) -> bool:
    stored = weights.bias(site)
    if stored is None or stored.numel() != price.numel():
        return False
    return torch.equal(stored.reshape(-1).float(), (-price).to(stored.dtype).float())


def _matters(price: Tensor) -> bool:
    return bool(price.max() > price.min())


def _bare(name: str) -> str:
    """A router's name without what PEFT puts around it."""
    words = [w for w in name.removeprefix("base_model.model.").split(".") if w != "base_layer"]
    if "modules_to_save" in words:
        words = words[: words.index("modules_to_save")]
    return ".".join(words)
