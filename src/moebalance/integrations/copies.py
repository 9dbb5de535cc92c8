"""Copies of a balanced model: they choose experts as it does, and are neither counted nor charged.

`copy.deepcopy` of a model copies its hooks too, and so does pickle, as in `torch.save(model)`. A
copy is nobody's: no handle steps it, and what is kept of it, such as an average of the weights or
the reference of DPO, is not trained. Its hooks are at rest until `attach(copy)` replaces them.

A reference keeps the price under which it was copied. Where somebody writes the copy's weights
later, as averaging does, the price in force in the original belongs to them.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moebalance.core.handle import Balancing
from moebalance.core.layer import LayerBalance

logger = logging.getLogger("moebalance")


class Hook:
    """What has methods that are hooks of one model; with a copy of the model it comes to rest."""

    at_rest = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy for a copy of the model."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        vars(twin).update({name: _copied(held, memo) for name, held in vars(self).items()})
        twin.at_rest = True
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load for a model that was pickled, a copy too."""
        vars(self).update(state)
        self.at_rest = True


class Origin:
    """Where a copied router comes from.

    Args:
        layer: the original's state.
        weights: of the original router, which the copy has.
    """

    def __init__(self, layer: LayerBalance, weights: Iterable[Tensor]) -> None:
        self.layer = layer
        weight = _first(weights)
        self._weight = None if weight is None else weight.clone()
        self._written = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """A copy of a copy has the same origin."""
        return self

    @torch.no_grad()
    def follow(self, own: LayerBalance, weights: Iterable[Tensor]) -> None:
        """Give `own` the original's state, if the copy's weights are no longer those it got."""
        if not self._written and self._weight is not None:
            weight = _first(weights)
            self._written = weight is not None and not torch.equal(weight, self._weight)
        if self._written:
            for mine, theirs in zip(own.buffers(), self.layer.buffers(), strict=True):
                mine.copy_(theirs)


class CopyReminder:
    """Warn once about a copy that is trained."""

    def __init__(self) -> None:
        self._told = False

    def saw_training(self) -> None:
        """A copy is trained, and nobody attached to it."""
        if self._told or torch.compiler.is_compiling():
            return
        self._told = True
        logger.warning(
            "moebalance: a copy of a balanced model is trained, and nothing of it is counted or "
            "charged. To balance it, attach to it too: attach(copy, method)."
        )


def release(model: nn.Module) -> None:
    """Take away the hooks at rest that came with a copy of a balanced model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._state_dict_hooks):
            for key in [key for key, hook in hooks.items() if _rests(hook)]:
                del hooks[key]
        for name in [name for name, held in vars(module).items() if _rests(held)]:
            delattr(module, name)


def _copied(held: Any, memo: dict[int, Any]) -> Any:
    """Torch copies no tensor that has a graph, such as the last logits."""
    in_graph = isinstance(held, Tensor) and not held.is_leaf
    return copy.deepcopy(held.detach() if in_graph else held, memo)


def _rests(hook: Any) -> bool:
    return any(isinstance(o, Hook | Balancing) and o.at_rest for o in _owners(hook))


def _owners(hook: Any) -> Iterator[Any]:
    """What a hook, or a method in a module's place, belongs to."""
    if isinstance(hook, partial):
        yield from _owners(hook.func)
        yield from hook.args
    elif isinstance(hook, Hook):
        yield hook
    else:
        yield getattr(hook, "__self__", None)


def _first(weights: Iterable[Tensor]) -> Tensor | None:
    """This process's part of a router's first weight; None where no values are."""
    found = next(iter(weights), None)
    if found is None or found.is_meta:
        return None
    return found.to_local() if isinstance(found, DTensor) else found.detach()
