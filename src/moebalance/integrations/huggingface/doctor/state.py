"""A balancing state beside a checkpoint, held against the weights that it lies beside."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moebalance.integrations.huggingface.doctor.weights import (
    Finding,
    Severity,
    and_more,
)
from moebalance.integrations.huggingface.routers import Site
from moebalance.integrations.huggingface.scan import Weights


class State(NamedTuple):
    """A balancing state beside a checkpoint.

    Attributes:
        balancer: the method and its parameters.
        steps: optimizer steps taken.
        prices: selection price (E,) of each router that has one, by the router's name.
        routers: names of all routers.
        finite: whether every tensor is.
    """

    balancer: str
    steps: int
    prices: dict[str, Tensor]
    routers: tuple[str, ...]
    finite: bool


def read_state(path: Path) -> State | None:
    """Read a balancing state; None if there is no file.

    Raises:
        ValueError: the file is damaged or was not written by moebalance.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("moebalance", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): take another checkpoint.") from error
    if "balancer" not in description:
        raise ValueError(f"{path} was not written by moebalance: it carries no description.")
    prices = {_plain(k): t for k, t in tensors.items() if k.endswith("price")}
    routers = tuple(dict.fromkeys(_plain(key) for key in tensors))
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    return State(description["balancer"], description["steps"], prices, routers, finite)


def check_state(state: State, sites: Sequence[Site], weights: Weights) -> list[Finding]:
    """Hold a balancing state against the model and the weights that it lies beside."""
    about = f"Balanced by {state.balancer} for {state.steps} steps"
    if not state.finite:
        return [Finding(Severity.ERROR, f"{about}; the state has NaN or infinite values.")]
    if {_bare(name) for name in state.routers} != {_bare(site.name) for site in sites}:
        return [
            Finding(
                Severity.ERROR,
                f"{about}, but the state is of other routers ({and_more(state.routers)}).",
                "Put the state beside the checkpoint that it was saved with.",
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


def _plain(key: str) -> str:
    """The router's name in a key of the balancing state."""
    return key.rpartition("/")[0]


def _bare(name: str) -> str:
    """A router's name without what PEFT puts around it."""
    words = [w for w in name.removeprefix("base_model.model.").split(".") if w != "base_layer"]
    if "modules_to_save" in words:
        words = words[: words.index("modules_to_save")]
    return ".".join(words)
