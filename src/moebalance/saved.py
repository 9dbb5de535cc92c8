"""What a saved balancing state must be to go on from."""

from collections.abc import Mapping
from typing import Any

from moebalance.balancers.base import Balancer
from moebalance.layer import LayerBalance

FORMAT = 1
"""Version of the layout of `Balancing.state_dict`."""


def check_fit(
    state: Mapping[str, Any], balancer: Balancer, layers: Mapping[str, LayerBalance]
) -> None:
    """Refuse a saved state that does not belong to these layers under this method.

    Raises:
        ValueError: another format, method, set of layers or number of experts.
    """
    for key in ("format", "method", "balancer", "steps", "layers"):
        if key not in state:
            raise ValueError(
                f"Not a balancing state: it has no {key!r} (keys: {sorted(state)}). "
                "Give what Balancing.state_dict() returned."
            )
    if state["format"] != FORMAT:
        raise ValueError(
            f"This balancing state has format {state['format']}; this version reads {FORMAT}. "
            "Use the version of moebalance that wrote it, or start without a state."
        )
    if state["method"] != method_name(balancer):
        raise ValueError(
            f"This balancing state belongs to {state['method']}, but the model is balanced by "
            f"{method_name(balancer)}. Attach the same method, or start without a state."
        )
    mine, theirs = set(layers), set(state["layers"])
    if mine != theirs:
        raise ValueError(
            "This balancing state belongs to another model: missing layers "
            f"{sorted(mine - theirs)[:3]}, unknown layers {sorted(theirs - mine)[:3]}."
        )
    for name, layer in layers.items():
        own = {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
        saved = {key: tuple(tensor.shape) for key, tensor in state["layers"][name].items()}
        if own != saved:
            raise ValueError(
                f"This balancing state does not fit {name}: saved {saved}, needed {own}."
            )


def method_name(balancer: Balancer) -> str:
    """Class names of a method and its parts: `PhiBalancing`, `Together(PhiBalancing, LossFree)`."""
    parts = [value for value in vars(balancer).values() if isinstance(value, Balancer)]
    inner = ", ".join(method_name(part) for part in parts)
    return f"{type(balancer).__name__}({inner})" if parts else type(balancer).__name__
