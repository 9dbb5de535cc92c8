"""Which tokens are real, and how they lie in sequences, as the call of the model tells.

A router sees rows of hidden states. The model around it is called with tokens (B, S), perhaps with
a mask of the same shape, or with the boundaries of packed sequences. All are noted when the model
is entered. Activation checkpointing runs layers again in backward: then they are noted again, for
the forward that the backward is of.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from moebalance.integrations.copies import Hook
from moebalance.integrations.outputs import tensors
from moebalance.routing import real_tokens

logger = logging.getLogger("moebalance")


class Call(NamedTuple):
    """One call of the model.

    Attributes:
        mask: (B, S) or (T,), True for real tokens; None if all are.
        shapes: (B, S) of each tensor that it was given.
        bounds: (N + 1,) where packed sequences begin and end; None if it was not told.
    """

    mask: Bool[Tensor, "*tokens"] | None = None
    shapes: tuple[tuple[int, int], ...] = ()
    bounds: Int[Tensor, "bounds"] | None = None


class Surround(Hook):
    """The call of the model that is in progress, in forward or in backward.

    Args:
        model: the model.
        mask: name of the argument that holds the mask; None for none.
        cu_seqlens: name of the argument that holds the boundaries; None for none.

    Raises:
        ValueError: the model's forward has no such argument.
    """

    def __init__(self, model: nn.Module, mask: str | None, cu_seqlens: str | None = None) -> None:
        self.mask, self.cu_seqlens, self.now = mask, cu_seqlens, Call()
        parameters = _signature(model)
        self._names = tuple(parameters)
        kinds = {parameter.kind for parameter in parameters.values()}
        for told, name in (("mask", mask), ("cu_seqlens", cu_seqlens)):
            if name and name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
                raise ValueError(
                    f"{told}={name!r}: {type(model).__name__}.forward has no such argument; it has "
                    f"{', '.join(self._names) or 'none'}."
                )
        masks = [name for name in self._names if "mask" in name]
        if masks and not mask:
            logger.warning(
                "moebalance: %s.forward takes %s, and all tokens are counted, padding too. If it "
                "is True (or 1) for real tokens, give attach(…, mask=%r).",
                type(model).__name__,
                masks[0],
                masks[0],
            )

    def hook(self, model: nn.Module) -> Iterable[Callable[[], None]]:
        """Watch the model; return how to stop it."""
        before: Any = self._enter
        yield model.register_forward_pre_hook(before, with_kwargs=True).remove
        yield model.register_forward_hook(self._leave).remove

    def rows(self, tokens: int) -> int | None:
        """B, if the model was given something of B · S = `tokens` tokens."""
        return next((batch for batch, length in self.now.shapes if batch * length == tokens), None)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(self._names, args, strict=False)) | kwargs
        given = [one for one in named.values() if isinstance(one, Tensor) and one.dim() >= 2]
        shapes = tuple((one.shape[0], one.shape[1]) for one in given)
        mask = self._read(
            named, self.mask, "mask", "the mask must be a tensor, True for real tokens"
        )
        bounds = self._read(
            named, self.cu_seqlens, "cu_seqlens", "the boundaries must be a tensor (N + 1,)"
        )
        if mask is not None:
            mask = real_tokens(mask, str(self.mask))
        self.now = Call(mask, shapes, bounds)

    def _read(
        self, named: dict[str, Any], name: str | None, argument: str, wanted: str
    ) -> Tensor | None:
        value = named.get(name) if name else None
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name}={type(value).__name__}: {wanted}. Name another argument as {argument}=…, "
                f"or {argument}=None."
            )
        return value

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call, self.now = self.now, Call()
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        for value in tensors(output):
            if value.requires_grad:
                value.register_hook(partial(self._resume, call))  # type: ignore[no-untyped-call]

    def _resume(self, call: Call, gradient: Tensor) -> None:
        """The backward of this call begins; it ends before the next call of the model."""
        self.now = call
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(self._forget)

    def _forget(self) -> None:
        self.now = Call()


def _signature(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of a model's forward, or of the one that a wrapper hands its own on to."""
    parameters = inspect.signature(model.forward).parameters
    if all(one.kind is not inspect.Parameter.VAR_POSITIONAL for one in parameters.values()):
        return parameters
    # Data parallelism, FSDP1 and DeepSpeed; PEFT and its tuners.
    wrapped = (getattr(model, name, None) for name in ("module", "base_model", "model"))
    inner = next((module for module in wrapped if isinstance(module, nn.Module)), None)
    return parameters if inner is None or inner is model else _signature(inner)
