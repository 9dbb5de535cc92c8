"""The forward in progress: which modules were entered, and what they said about the tokens.

Routers are called deep within a model; its outer modules know the padding, the labels and whose
forward this is. Every Transformers model in the tree that holds a router is an entrance, so that a
model may be called through one of its parts (`model.thinker(…)`).
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from moebalance.integrations.huggingface.tokens import Layout, Source


class Context(NamedTuple):
    """One forward.

    Attributes:
        layouts: the tokens of each stack of layers.
        weight: the batch's weight in its step; None for 1.
    """

    layouts: tuple[Layout, ...]
    weight: Tensor | None = None


@dataclass(frozen=True)
class Entrance:
    """A module through which a forward may begin.

    Attributes:
        number: its place among the entrances.
        module: itself.
        arguments: the names of what `forward` takes by position.
        around: numbers of the entrances around it.
        stack: number of the stack of layers that it is; None if it holds other entrances alone.
        outermost: whether no Transformers model is around it.
        decodes: whether it is the decoder behind an encoder.
        holds_both: whether it takes arguments of an encoder and of a decoder.
    """

    number: int
    module: nn.Module
    arguments: tuple[str, ...]
    around: frozenset[int]
    stack: int | None
    outermost: bool
    decodes: bool = False
    holds_both: bool = False

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}


class Call(NamedTuple):
    """An entrance that was entered, and with what."""

    entrance: Entrance
    given: dict[str, Any]


@dataclass
class Forward:
    """What routers ask about the forward that calls them.

    Activation checkpointing calls them again in the backward pass; then it is the forward whose
    backward that is, which need not be the last one.

    Attributes:
        context: of this forward.
        calls: the entrances that are entered and not left, outermost first.
        reference: whether this is a forward of a reference policy, which no price may touch.
    """

    context: Context
    calls: tuple[Call, ...] = field(default=())
    reference: bool = False

    def resume(self, context: Context, gradient: Tensor) -> None:
        """Go back to the forward whose output now receives its gradient."""
        self.context = context

    def enter(self, entrance: Entrance, given: dict[str, Any]) -> bool:
        """Note a call; True if it begins a forward.

        A call that an exception ended was never left. It is forgotten, and with it those around it:
        the exception ended them as well.
        """
        within = tuple(c for c in self.calls if c.entrance.number in entrance.around)
        if len(within) < len(self.calls):
            within = ()
        self.calls = (*within, Call(entrance, given))
        return len(within) == 0  # Dynamo traces no `not` of a tuple

    def leave(self, entrance: Entrance) -> bool:
        """Note the end of a call; True if it ends the forward."""
        self.calls = tuple(c for c in self.calls if c.entrance.number in entrance.around)
        return len(self.calls) == 0  # Dynamo traces no `not` of a tuple

    def sources(self, *, decodes: bool) -> list[Source]:
        """Arguments of the calls in progress, innermost first."""
        inner, *outer = reversed(self.calls)
        both = [call.entrance.holds_both and decodes for call in outer]
        named = zip(outer, both, strict=True)
        return [
            Source(inner.given),
            *(Source(call.given, "decoder_" if two else "") for call, two in named),
        ]


def find_entrances(model: nn.Module, routers: Sequence[nn.Module]) -> list[Entrance]:
    """The Transformers models of a tree that hold a router, and the module around them all."""
    wanted = {id(router) for router in routers}
    held = [
        (name, module)
        for name, module in model.named_modules()
        if (module is model or isinstance(module, PreTrainedModel))
        and any(id(inner) in wanted for inner in module.modules())
    ]
    decoders = {id(decoder) for _, module in held if (decoder := _decoder(module)) is not None}
    entrances: list[Entrance] = []
    stacks = 0
    for number, (name, module) in enumerate(held):
        around = frozenset(n for n, (outer, _) in enumerate(held) if _is_around(outer, name))
        innermost = _innermost(module, wanted)
        entrances.append(
            Entrance(
                number=number,
                module=module,
                arguments=_arguments(module),
                around=around,
                stack=stacks if innermost else None,
                outermost=not any(isinstance(held[n][1], PreTrainedModel) for n in around),
                decodes=id(module) in decoders,
                holds_both=any(_decoder(inner) is not None for inner in module.modules()),
            )
        )
        stacks += innermost
    return entrances


def holder(entrances: Sequence[Entrance], router: nn.Module) -> int:
    """Number of the stack of layers that a router belongs to: the innermost around it."""
    for entrance in reversed(entrances):
        if entrance.stack is not None and any(m is router for m in entrance.module.modules()):
            return entrance.stack
    raise AssertionError("every router has a Transformers model around it")


def _innermost(module: nn.Module, wanted: set[int]) -> bool:
    """Whether a router in `module` has no Transformers model between."""
    for child in module.children():
        if isinstance(child, PreTrainedModel):
            continue
        if id(child) in wanted or _innermost(child, wanted):
            return True
    return False


def _is_around(outer: str, name: str) -> bool:
    return outer != name and (not outer or name.startswith(f"{outer}."))


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Names of positional arguments, of the class's code, whatever stands on the instance."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(module).forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)[1:]


def _decoder(module: nn.Module) -> nn.Module | None:
    """The decoder of a model that has an encoder, too."""
    if not isinstance(module, PreTrainedModel):
        return None
    if not getattr(module.config, "is_encoder_decoder", False):
        return None
    decoder = module.get_decoder()  # type: ignore[no-untyped-call]
    return decoder if isinstance(decoder, nn.Module) and decoder is not module else None
