"""Find the modules that a user names as routers, and refuse what cannot be one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from moebalance.core.state import bare_name
from moebalance.gates import Gate, GroupLimit, Softmax
from moebalance.integrations.named.places import members
from moebalance.methods.base import Method, refuse_frozen

Routers = str | Sequence[str | nn.Module] | Callable[[str], bool]
"""A glob pattern over names, a list of names and modules, or a test of the name.

Names are those of modules; where none fits, those of methods and parameters.
"""


class Rule(NamedTuple):
    """How the user's layers choose from their logits.

    Attributes:
        top_k: K, experts per token.
        gate: how scores come from the logits.
        normalize: whether a token's K weights are divided by their sum; None if not told.
        limit: the groups of experts that a token may choose from; None for all experts.
        num_experts: E; None to read it off each module.
        mask: the argument of the model's forward that says which tokens are real.
        cu_seqlens: the argument that says where packed sequences begin and end.
    """

    top_k: int
    gate: Gate
    normalize: bool | None = None
    limit: GroupLimit | None = None
    num_experts: int | None = None
    mask: str | None = None
    cu_seqlens: str | None = None


class Named(NamedTuple):
    """Where logits come from.

    Attributes:
        name: in the bare model.
        module: the module that returns logits, or that has the member.
        num_experts: E.
        member: the method that returns logits, or the parameter that they are made with; None for
            the module itself.
    """

    name: str
    module: nn.Module
    num_experts: int
    member: str | None = None

    @property
    def weights(self) -> list[nn.Parameter]:
        """What the logits are made with, as far as it is known."""
        own = self.module._parameters.get(self.member or "")
        return list(self.module.parameters()) if own is None else [own]


def rule(top_k: int | None, gate: Gate | None, **more: Any) -> Rule:
    """Check what the user says of the layers.

    Raises:
        ValueError: `top_k` is missing or below 1.
        TypeError: a gate or a limit that is none.
    """
    if top_k is None:
        raise ValueError(
            "routers= names modules that return logits, and nothing says how many experts a token "
            "gets from them: also give top_k, for example top_k=2."
        )
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k={top_k!r}: must be a whole number of experts, at least 1.")
    gate = Softmax() if gate is None else gate
    if not isinstance(gate, Gate):
        raise TypeError(f"gate={gate!r}: must be a Gate, for example Softmax() or Sigmoid().")
    found = Rule(top_k, gate, **more)
    if found.limit is not None and not isinstance(found.limit, GroupLimit):
        raise TypeError(f"limit={found.limit!r}: must be a GroupLimit such as GroupLimit(8, 4).")
    return found


def find(model: nn.Module, routers: Routers, how: Rule, method: Method) -> list[Named]:
    """Find the routers, in the model's order.

    Raises:
        ValueError: a name, pattern or test that matches nothing, a module whose number of experts
            is unknown or too small, modules of different sizes or inside of each other, or a
            frozen module under a method that needs its gradient.
        TypeError: `routers` is something else.
    """
    modules = [(bare_name(model, wrapped), module) for wrapped, module in model.named_modules()]
    wanted = _wanted(model, modules, routers)
    found = []
    for name, module in modules:
        if (id(module), None) in wanted:
            found.append(Named(name or "router", module, _experts(name, module, how)))
        for full, own in members(name, module):
            if (id(module), own) in wanted:
                wanted.remove((id(module), own))  # a method of two classes is one
                found.append(Named(full, module, _told(full, how), own))
    _refuse_nested(found)
    if isinstance(routers, str) or callable(routers):
        _refuse_mixture(found, routers, how)
    for one in found:
        _check(one, how, method)
    return found


def suggestion(model: nn.Module) -> str:
    """How to name the routers of this model, if some of its modules look like routers."""
    names = [
        bare_name(model, name)
        for name, module in model.named_modules()
        if _rows(module) and name.rpartition(".")[2].lower() in ("gate", "router", "wg", "switch")
    ]
    last = names[0].rpartition(".")[2] if names else "gate"
    seen = f" Here {names[0]} looks like one." if names else ""
    pattern = f"*.{last}" if "." in (names[0] if names else ".") else last
    return (
        "name the modules that return its routers' logits: attach(model, method, routers=\""
        f'{pattern}", top_k=2, gate=mb.Softmax()).{seen}'
    )


_Place = tuple[int, str | None]
"""The identity of a module, and the name of its member or None."""


def _wanted(
    model: nn.Module, modules: Sequence[tuple[str, nn.Module]], routers: Routers
) -> set[_Place]:
    """What is meant."""
    if isinstance(routers, nn.Module) or not (
        isinstance(routers, str | Sequence) or callable(routers)
    ):
        raise TypeError(
            f"routers={routers!r}: give a pattern such as '*.gate', a list of names or modules, or "
            "a function of the name."
        )
    if callable(routers):
        return _some(_places(modules, routers), repr(routers), modules)
    wanted: set[_Place] = set()
    for one in [routers] if isinstance(routers, str) else routers:
        if isinstance(one, nn.Module):
            matches: set[_Place] = {(id(m), None) for _, m in modules if m is one}
            shown = type(one).__name__
        else:
            matches, shown = _places(modules, partial(_fits, one)), repr(one)
        wanted |= _some(matches, shown, modules)
    return _some(wanted, "[]", modules)


def _fits(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern)


def _places(modules: Sequence[tuple[str, nn.Module]], fits: Callable[[str], bool]) -> set[_Place]:
    """The modules whose name fits; where there is none, their methods and parameters."""
    found: set[_Place] = {(id(module), None) for name, module in modules if fits(name)}
    return found or {
        (id(module), own)
        for name, module in modules
        for full, own in members(name, module)
        if fits(full)
    }


def _some(
    matches: set[_Place], shown: str, modules: Sequence[tuple[str, nn.Module]]
) -> set[_Place]:
    if matches:
        return matches
    like = [name for name, module in modules if _rows(module)]
    raise ValueError(
        f"routers={shown} names none of the model's {len(modules)} modules, and no method or "
        "parameter of theirs. Modules with a weight of two axes are called "
        f"{', '.join(map(repr, like[:8])) or 'nothing: there are none'}"
        f"{', …' if len(like) > 8 else ''}. A pattern must fit the whole name: '*.gate'."
    )


def _rows(module: nn.Module) -> int | None:
    """How many outputs a module has, by what it says of itself or by its weight."""
    told = getattr(module, "out_features", None)
    if isinstance(told, int):
        return told
    weight = getattr(module, "weight", None)
    shape: Any = getattr(
        weight, "ds_shape", getattr(weight, "shape", ())
    )  # DeepSpeed's ZeRO-3 hides it
    return int(shape[0]) if len(shape) == 2 else None


def _experts(name: str, module: nn.Module, how: Rule) -> int:
    read, told = _rows(module), how.num_experts
    if told is not None and isinstance(module, nn.Linear) and read != told:
        raise ValueError(
            f"{name} has {read} outputs, but num_experts={told}: narrow routers= to the modules "
            "that return logits, one for each expert."
        )
    if told is not None:
        return told
    if read is None:
        raise ValueError(
            f"{name} ({type(module).__name__}) has neither out_features nor a weight of one row an "
            "expert, so nothing says that it returns logits. If its output, or the first tensor of "
            "its output, has the experts on its last axis, also give num_experts. If not, name the "
            "module that does."
        )
    return read


def _told(name: str, how: Rule) -> int:
    if how.num_experts is None:
        raise ValueError(
            f"{name} is a method or a parameter, and nothing says how many experts its logits are "
            "for: also give num_experts."
        )
    return how.num_experts


def _refuse_nested(found: Sequence[Named]) -> None:
    for outer in (one for one in found if one.member is None):
        inside = {id(module) for module in outer.module.modules()} - {id(outer.module)}
        for inner in found:
            if id(inner.module) in inside:
                raise ValueError(
                    f"routers= names both {outer.name} and {inner.name} inside of it: the same "
                    "logits would be charged twice. Name one of them."
                )


def _refuse_mixture(found: Sequence[Named], routers: Any, how: Rule) -> None:
    """A pattern that also fits `gate_proj` of the experts is a mistake, not a wish."""
    first = found[0]
    other = next((one for one in found if one.num_experts != first.num_experts), None)
    if other is not None:
        raise ValueError(
            f"routers={routers!r} names {first.name} with {first.num_experts} outputs and "
            f"{other.name} with {other.num_experts}. Narrow it to the routers; if their numbers "
            "of experts do differ, give a list of names."
        )


def _check(one: Named, how: Rule, method: Method) -> None:
    if one.num_experts < 2 or how.top_k > one.num_experts:
        raise ValueError(
            f"top_k={how.top_k} with {one.name}, which has {one.num_experts} experts: top_k must "
            "lie in 1..num_experts, and a router needs at least two experts."
        )
    if how.limit is not None:
        how.limit.check(one.num_experts, how.top_k)
    weights = one.weights
    if weights:
        refuse_frozen(one.name, method, trains=any(w.requires_grad for w in weights))
