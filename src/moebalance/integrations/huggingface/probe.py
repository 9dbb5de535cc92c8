"""Recognise a router's rule: run its class's own code on plain stand-ins for its tensors.

The weights of a router need not be plainly there. DeepSpeed ZeRO-3 holds empty placeholders,
bitsandbytes holds packed bytes, offloading and deferred initialisation hold meta tensors, and a
kernel from the Hub may stand in place of `forward`. The rule is in the class: only the shapes are
taken from the router.
"""

import copy
import inspect
from collections import OrderedDict
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from moebalance.integrations.huggingface.conventions import Answer, Convention
from moebalance.integrations.huggingface.release import hint
from moebalance.integrations.rule import Rule, recognise

NATIVE_BIAS = ("e_score_correction_bias", "expert_bias", "balancing_biases")
"""Names under which Transformers' routers keep a selection bias."""

_TOKENS = 64
PLAIN_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_REPLACED = ("forward", "_old_forward", "_hf_hook")
"""What Accelerate, DeepSpeed and Hub kernels put on an instance, over the code of its class."""


def probe(
    name: str, router: nn.Module, convention: Convention, top_k: int
) -> tuple[Convention, Answer, Rule | None]:
    """Find out how a router answers and weighs, in float32 and with a selection bias of 0.

    Args:
        name: of the router, for errors.
        router: the module; only its code and the shapes of its tensors matter.
        convention: how it answers, as far as its class tells.
        top_k: K.

    Returns:
        The convention, one answer, and the rule; None for the rule where no experiment finds it.

    Raises:
        ValueError: it cannot be called like a router, or it chooses more experts than it has.
    """
    random = torch.Generator().manual_seed(0)
    twin = stand_in(router, random)
    matrix = next((p for p in twin.parameters() if p.dim() == 2), None)
    if matrix is None:
        raise unknown(name, router, "it has no weight matrix")
    num_experts, hidden = matrix.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"{name} sends each token to {top_k} of {num_experts} experts: top_k must lie in "
            "1..num_experts. Mend the model's configuration."
        )
    # Logits of order one: the affinities then differ clearly and no weight underflows.
    tokens = torch.randn(1, _TOKENS, hidden, generator=random, device="cpu") / hidden**0.5
    # Of one expert a token, normalised, the weight is 1 under every gate: two tell gates apart.
    probed_k = 2 if top_k == 1 and hasattr(router, "top_k") else top_k
    if probed_k != top_k:
        cast(Any, twin).top_k = probed_k
    try:
        return _answer(convention, twin, tokens, num_experts, probed_k)
    except (AssertionError, TypeError, ValueError, RuntimeError, LookupError, AttributeError) as e:
        reason = str(e) or type(e).__name__
        raise unknown(name, router, f"calling it on hidden states failed: {reason}") from e


def _answer(
    convention: Convention, twin: nn.Module, tokens: Tensor, num_experts: int, top_k: int
) -> tuple[Convention, Answer, Rule | None]:
    extra = [torch.zeros(num_experts, device="cpu") for _ in bias_arguments(twin)]
    output = _call(twin, tokens, extra)
    answer = convention.read(output, top_k)
    if convention.gate is not None:
        return convention, answer, None
    if _are_probabilities(answer.logits):
        convention = replace(convention, probabilities=True)
        answer = convention.read(output, top_k)
    weights = answer.carrier
    if weights.shape != answer.experts.shape:  # one column an expert
        weights = weights.gather(-1, answer.experts)
    return convention, answer, recognise(answer.logits, weights, answer.experts)


def stand_in(module: nn.Module, random: torch.Generator) -> nn.Module:
    """A module of the same code on the CPU: random weights, a selection bias of 0, no hooks."""
    twin = copy.copy(module)
    state: dict[str, Any] = twin.__dict__
    for key in _REPLACED:
        state.pop(key, None)
    for key in _HOOKS:
        state[key] = OrderedDict()
    state["_parameters"] = {
        key: None if p is None else nn.Parameter(_random(key, p, random), requires_grad=False)
        for key, p in module._parameters.items()
    }
    state["_buffers"] = {
        key: None if b is None else _random(key, b, random) for key, b in module._buffers.items()
    }
    state["_modules"] = {
        key: None if child is None else _stand_in_part(child, random)
        for key, child in module._modules.items()
    }
    return twin


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Shape of a tensor of which this process may hold a part, as under DeepSpeed ZeRO-3."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def bias_arguments(router: nn.Module) -> list[str]:
    """Arguments of `forward` by which the block hands over its selection bias."""
    return [name for name in inspect.signature(router.forward).parameters if name in NATIVE_BIAS]


def unknown(name: str, router: nn.Module, why: str) -> ValueError:
    """The refusal of a router whose rule was not found."""
    return ValueError(
        f"{name} ({type(router).__name__}) is a router of a kind moebalance does not know: {why}. "
        "Supported are routers that return (logits, weights, experts) with softmax or sigmoid "
        "affinities. If this one makes its logits with a single weight, name the weight and say "
        f"its rule: attach(…, routers=['{name}.weight'], num_experts=…, top_k=…, gate=…). To "
        "balance the other routers alone, name them: attach(…, layers=[…])." + hint()
    )


def _stand_in_part(module: nn.Module, random: torch.Generator) -> nn.Module:
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not (isinstance(rows, int) and isinstance(columns, int)):
        return stand_in(module, random)
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, Tensor) and weight.dtype in PLAIN_DTYPES
    if plain and whole_shape(cast(Tensor, weight)) == (rows, columns) and not module._modules:
        return stand_in(module, random)
    # Quantised, or with adapters around it: what it stands for is a linear map.
    linear = nn.Linear(
        columns, rows, bias=getattr(module, "bias", None) is not None, device="cpu"
    ).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random, device="cpu"))
    return linear


def _random(key: str, tensor: Tensor, random: torch.Generator) -> Tensor:
    shape = whole_shape(tensor)
    if key in NATIVE_BIAS:
        return torch.zeros(shape, device="cpu")
    if key == "per_expert_scale":  # a factor on the weights, outside of the rule
        return torch.ones(shape, device="cpu")
    return torch.randn(shape, generator=random, device="cpu")


@torch.no_grad()
def _call(router: nn.Module, tokens: Tensor, extra: list[Tensor]) -> Any:
    """Call a router on tokens (T, D), or (1, T, D) where it insists on the batch."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        try:
            return router(tokens[0], *extra)
        except (ValueError, IndexError):
            return router(tokens, *extra)


def _are_probabilities(x: Tensor) -> bool:
    """Whether rows are distributions, which the logits of random weights never are."""
    return bool((x >= 0).all()) and torch.allclose(x.sum(dim=-1), torch.ones(()))
