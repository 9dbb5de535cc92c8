"""Parts of a model that are compiled already ignore hooks added later."""

from torch import nn


def compiled_part(model: nn.Module) -> str | None:
    """The name of the first compiled module, "" for the model itself; None if there is none."""
    return next((name for name, module in model.named_modules() if _is_compiled(module)), None)


def refuse_compiled(model: nn.Module) -> None:
    """Refuse to attach to a model that is compiled, whole or in parts.

    Raises:
        ValueError: names the part and the remedy.
    """
    name = compiled_part(model)
    if name is not None:
        raise ValueError(
            f"{name or type(model).__name__} is compiled already, and a compiled model ignores "
            "hooks added later: attach first, then compile."
        )


def _is_compiled(module: nn.Module) -> bool:
    if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
        return True
    # As of `module.forward = torch.compile(module.forward)`; `torch.compiler.disable` marks, too.
    forward = vars(module).get("forward")
    marked = hasattr(forward, "_torchdynamo_orig_callable")
    return marked and not hasattr(forward, "_torchdynamo_disable")
