"""A balancing state next to a checkpoint, compared with the weights there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebalance.core.layer import LayerBalance
from moebalance.core.state import check_fit, check_values, under_names_of
from moebalance.integrations.huggingface.routers import Site
from moebalance.integrations.huggingface.scan import Weights
from moebalance.integrations.huggingface.state_file import STATE_FILE, read
from moebalance.integrations.names import without_adapters
from moebalance.lab.console import counted
from moebalance.lab.doctor.weights import and_more
from moebalance.report.diagnosis.finding import Finding, Severity
from moebalance.words.reprs import method_of


def read_state(folder: Path) -> Mapping[str, Any] | None:
    """Read a balancing state; None if there is no file.

    Raises:
        ValueError: the file is damaged or was not written by moebalance.
    """
    return read(folder) if (folder / STATE_FILE).is_file() else None


def check_state(state: Mapping[str, Any], sites: Sequence[Site], weights: Weights) -> list[Finding]:
    """Judge a state as loading it would, and compare it with the weights next to it."""
    try:
        findings = [fit(state, sites)]
    except ValueError as error:  # the words of `Balancing.load_state_dict`
        advice = "Put the state next to the checkpoint that it was saved with."
        other = "another model" in str(error)
        return [Finding(Severity.ERROR, str(error), advice if other else "")]
    prices = {
        without_adapters(name): tensor
        for name, layer in state["layers"].items()
        for key, tensor in layer.items()
        if key.endswith("price")
    }
    priced = [
        s
        for s in sites
        if without_adapters(s.name) in prices and _matters(prices[without_adapters(s.name)])
    ]
    method = method_of(state["method_repr"])
    in_nats = method is not None and not method.traits.has_selection_price
    homeless = [site.name for site in priced if site.bias_name is None or in_nats]
    if homeless:
        why = "a price in nats fits in no bias" if in_nats else "this family has no selection bias"
        findings.append(
            Finding(
                Severity.WARNING,
                f"The trained selection price of {and_more(homeless)} is in the balancing state "
                f"only, for {why}: the weights alone route otherwise than in training.",
                "Resume with moebalance. To export a model, train it with a method that charges in "
                "the loss, such as PhiBalancing.",
            )
        )
    dropped = [
        site.name
        for site in priced
        if site.name not in homeless
        and not _holds(site, prices[without_adapters(site.name)], weights)
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


def fit(state: Mapping[str, Any], sites: Sequence[Site]) -> Finding:
    """What there is to say of a state that can be loaded.

    Raises:
        ValueError: it would be refused, with the words of the refusal.
    """
    check_values(state)
    about = f"Balanced by {state['method_repr']} for {counted(state['steps'], 'step')}"
    method = method_of(state["method_repr"])
    if method is None:
        return Finding(
            Severity.WARNING,
            f"{about}; this is no method of moebalance, so whether the state fits is not known.",
            "Load it with that method attached: it is checked then.",
        )
    saved = {without_adapters(name) for name in state["layers"]}
    balanced = [site for site in sites if without_adapters(site.name) in saved]
    if len(balanced) < len(saved):  # of another model, as the check will say
        balanced = list(sites)
    with torch.device("meta"):
        layers = {s.name: LayerBalance(method, s.num_experts, gate=s.gate) for s in balanced}
    check_fit(under_names_of(layers, state, without_adapters), method, layers)
    which = "these routers" if len(layers) == len(sites) else f"{len(layers)} of these routers"
    return Finding(Severity.OK, f"{about}; the state is of {which}.")


def _holds(site: Site, price: Tensor, weights: Weights) -> bool:
    stored = weights.bias(site)
    if stored is None or stored.numel() != price.numel():
        return False
    return torch.equal(stored.reshape(-1).float(), (-price).to(stored.dtype).float())


def _matters(price: Tensor) -> bool:
    return bool(price.max() > price.min())
