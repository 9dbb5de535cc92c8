"""Where a router's logits come by: the output of a module, of a method, or of a use of a parameter.

routers="*.gate"                an nn.Linear, or any module that returns logits
routers="*.get_expert_logits"   a method of a layer; it is wrapped
routers="*.w_gating"            a parameter (D, E); what the layer's forward computes of it and
                                the tokens is looked at, as far as the last axis is E
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from moebalance.integrations.copies import Hook

After = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""What is called with a module, its arguments and its output; None to keep the output."""


def members(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Full and own name of each parameter and method of a module that logits may come from."""
    prefix = f"{name}." if name else ""
    for own in module._parameters:
        yield prefix + own, own
    for kind in type(module).__mro__:
        if kind is nn.Module:
            return
        for own, value in vars(kind).items():
            if callable(value) and not own.startswith("_") and own != "forward":
                yield prefix + own, own


def listen(module: nn.Module, member: str | None, experts: int, after: After) -> Callable[[], None]:
    """Call `after` whenever logits come by; return how to stop it.

    Args:
        module: the module, or the one that a method or a parameter belongs to.
        member: the name of the method or the parameter; None for the module's output.
        experts: E.
        after: what to call.
    """
    if member is None:
        return module.register_forward_hook(after).remove
    if member not in module._parameters:
        return _wrap(module, member, after)
    uses = _Uses(module, member, experts, after)
    before: Any = uses.enter
    handles = [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(uses.leave, always_call=True),
    ]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def _wrap(module: nn.Module, member: str, after: After) -> Callable[[], None]:
    module.__dict__[member] = _Wrapped(module, member, after)
    return partial(delattr, module, member)


class _Wrapped(Hook):
    """A method of a module, and what is called after it.

    Args:
        module: the module.
        member: the method's name.
        after: what to call with its output.
    """

    def __init__(self, module: nn.Module, member: str, after: After) -> None:
        self.module, self.after = module, after
        self.inner = getattr(module, member)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, and what comes after it."""
        output = self.inner(*args, **kwargs)
        changed = self.after(self.module, args, output)
        return output if changed is None else changed


class _Uses(Hook, TorchFunctionMode):
    """Look at what a module's forward computes of one of its parameters.

    Args:
        module: the module.
        member: the parameter's name.
        experts: E.
        after: what to call with the logits.
    """

    def __init__(self, module: nn.Module, member: str, experts: int, after: After) -> None:
        super().__init__()
        self.module, self.member, self.experts, self.after = module, member, experts, after
        self.forms: list[Tensor] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The module's forward begins."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"routers= names the parameter {self.member} of {type(module).__name__}, which is "
                "looked at call by call: do not compile this layer, or use CountAndCharge in it."
            )
        self.forms = []
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """It is over."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self.forms = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; what it makes of tokens and the parameter are logits."""
        output = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        of_it = [self._is_form(tensor) for tensor in given]
        if not any(of_it) or not isinstance(output, Tensor):
            return output
        if all(of_it):  # a view, a transposition, another dtype
            self.forms.append(output)
        elif output.shape[-1:] == (self.experts,) and output.is_floating_point():
            changed = self.after(self.module, args, output)
            return output if changed is None else changed
        return output

    def _is_form(self, tensor: Tensor) -> bool:
        # Asked for at each call: a sharded parameter is another tensor in forward.
        own = self.module._parameters[self.member]
        return tensor is own or any(tensor is form for form in self.forms)
