"""What a saved balancing state must be to go on from."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from moebalance.core.layer import LayerBalance
from moebalance.core.sound import COUNTS, steps_problem, tensors_problem
from moebalance.methods.base import Method, inner_methods
from moebalance.methods.lineage import Lineage

logger = logging.getLogger("moebalance")

FORMAT = 3
"""Version of the layout of `Balancing.state_dict`; 3 numbers the parts of `Together`."""

_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""How torch's compiler, activation checkpointing and FSDP1 call what they wrap."""


def check_fit(
    state: Mapping[str, Any],
    method: Method,
    layers: Mapping[str, LayerBalance],
    *,
    parents: Sequence[int | Sequence[int]] | None = None,
) -> dict[str, Lineage]:
    """Refuse a saved state that does not belong to these layers under this method.

    Other hyper-parameters of the same method are no reason, but worth a warning. Call
    `check_values` first.

    Returns:
        Where `parents` are given, how each layer's experts descend from the saved ones.

    Raises:
        ValueError: another format, method, set of layers or number of experts; or values that
            do not suit the method.
    """
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise ValueError(
            f"This balancing state has format {str(state['format'])[:60]}; this version reads "
            f"{FORMAT}. Use the version of moebalance that wrote it, or start without a state."
        )
    if state["method"] != method_name(method):
        raise ValueError(
            f"This balancing state belongs to {state['method']}, but the model is balanced by "
            f"{method_name(method)}. Attach the same method, or start without a state."
        )
    mine, theirs = set(layers), set(state["layers"])
    if mine != theirs:
        raise ValueError(
            "This balancing state belongs to another model: missing layers "
            f"{sorted(mine - theirs)[:3]}, unknown layers {sorted(theirs - mine, key=str)[:3]}."
        )
    lineages = {}
    for name, layer in layers.items():
        own = {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
        saved = {key: tuple(tensor.shape) for key, tensor in state["layers"][name].items()}
        if parents is not None:
            lineages[name] = lineage = _lineage(parents, name, layer, saved)
            own |= {key: _then(own[key], lineage) for key in own if key != COUNTS}
        if own != saved:
            raise ValueError(
                f"This balancing state does not fit {name}: saved {saved}, needed {own}. "
                "If experts were copied, merged or taken out since, say of which each descends: "
                "parents=[…]."
            )
        problem = layer.problem(state["layers"][name], lineages.get(name))
        if problem:
            raise ValueError(f"The balancing state of {name} is refused: {problem}")
    if state["method_repr"] != repr(method):
        logger.warning(
            "moebalance: state saved under %s continues under %r.", state["method_repr"], method
        )
    return lineages


def check_values(state: Mapping[str, Any]) -> None:
    """Refuse a saved state that no method could go on from, whatever the model.

    Raises:
        ValueError: a part is missing; steps are no whole number ≥ 0; or a tensor is not float32,
            not finite or too large.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"Not a balancing state but {type(state).__name__}: give what Balancing.state_dict() "
            "returned."
        )
    for key in ("format", "method", "method_repr", "steps", "layers"):
        if key not in state:
            raise ValueError(
                f"Not a balancing state: it has no {key!r} (keys: {sorted(state, key=str)[:9]}). "
                "Give what Balancing.state_dict() returned."
            )
    words = [key for key in ("method", "method_repr") if not isinstance(state[key], str)]
    problem = f"its {words[0]} is no text." if words else steps_problem(state["steps"])
    if not problem and not isinstance(state["layers"], Mapping):
        problem = f"its layers are {type(state['layers']).__name__}, not a table by name."
    if problem:
        raise ValueError(f"This balancing state is refused: {problem}")
    for name, tensors in state["layers"].items():
        problem = tensors_problem(tensors)
        if problem:
            raise ValueError(f"The balancing state of {name} is refused: {problem}")


def under_names_of(
    layers: Iterable[str], state: Mapping[str, Any], plain: Callable[[str], str]
) -> Mapping[str, Any]:
    """A saved state with these names for layers whose saved ones differ from them by wrappers.

    Args:
        layers: the names.
        state: that passed `check_values`.
        plain: what is the same of a name, whatever is around the layer.
    """
    own = {plain(name): name for name in layers}
    saved = state["layers"]
    renamed = {own.get(plain(str(name)), name): tensors for name, tensors in saved.items()}
    # Two names of one layer: which of them is meant is not ours to say.
    return {**state, "layers": renamed} if len(renamed) == len(saved) else state


def plain_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A model's weights without balancing state, for the same model without our routers.

    A selection price is state, too, so the model goes on with its own choice.

    Args:
        model: the model, wrapped or not, with `BalancedRouter`s or `CountAndCharge`s.
        state_dict: its state dict, where you already have one, for example from
            `get_model_state_dict` of a sharded model; None for `model.state_dict()`.

    >>> import moebalance as mb
    >>> router = mb.BalancedRouter(mb.LossFree(), num_experts=4, top_k=2)
    >>> model = nn.ModuleDict({"gate": nn.Linear(3, 4, bias=False), "router": router})
    >>> list(mb.plain_state_dict(model))
    ['gate.weight']
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    ours = {
        _bare_key(f"{name}.{buffer}")
        for name, module in model.named_modules()
        if isinstance(module, LayerBalance)
        for buffer in module._buffers
    }
    return {key: value for key, value in state_dict.items() if _bare_key(key) not in ours}


def _bare_key(key: str) -> str:
    """A key without the names of wrappers, which stand in some state dicts and not in others."""
    return ".".join(word for word in key.split(".") if word and word not in {*_WRAPPED, "module"})


def _lineage(
    parents: Sequence[int | Sequence[int]],
    name: str,
    layer: LayerBalance,
    saved: Mapping[str, tuple[int, ...]],
) -> Lineage:
    """The descent of one layer's experts; of how many is read off what was saved of them."""
    if len(parents) != layer.num_experts:
        raise ValueError(
            f"parents has {len(parents)} entries, but {name} has {layer.num_experts} experts: "
            "give one entry for each."
        )
    lengths = {shape[0] for key, shape in saved.items() if shape and key != COUNTS}
    named = [p for each in parents for p in (each if isinstance(each, Sequence) else (each,))]
    # Of a method without memory nothing says how many there were, and nothing depends on it.
    return Lineage.of(parents, max(lengths) if lengths else 1 + max(named, default=0))


def _then(shape: tuple[int, ...], lineage: Lineage) -> tuple[int, ...]:
    """The shape that a layer's tensor had with the old experts."""
    return tuple(lineage.num_parents if n == lineage.num_experts else n for n in shape)


def bare_name(model: nn.Module, name: str) -> str:
    """Name of a submodule in a model without the wrappers that are around it or its parts.

    What DDP or `torch.compile` has wrapped is saved under the names of the bare model. A module of
    the user's own that is called `module` keeps its name.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> bare_name(DataParallel(model), "module.0")
    '0'
    """
    words = []
    around: Any = model
    for word in name.split("."):
        parallel = isinstance(around, DataParallel | DistributedDataParallel)
        if not (word in _WRAPPED or (parallel and word == "module")):
            words.append(word)
        around = getattr(around, word, None)
    return ".".join(words)


def method_name(method: Method) -> str:
    """Class names of a method and its parts: `Together(PhiBalancing, LossFree)`."""
    inner = ", ".join(method_name(part) for part in inner_methods(method))
    return f"{type(method).__name__}({inner})" if inner else type(method).__name__
