"""Router logits that Transformers returns with `output_router_logits=True`, saved to a file.

    torch.save({"router_logits": out.router_logits, "attention_mask": mask}, "logits.pt")

Logits do not say how many experts a token gets, so that must be given. The choice is top-k of the
logits: a selection bias or groups of experts are not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moebalance.lab.traces.load import Load, Missing, as_run, counted, real_tokens
from moebalance.runlog import Run

KEY = "router_logits"


def read_logits(path: Path, held: Mapping[str, Any], missing: Missing) -> tuple[Run, str]:
    """One run whose evaluation is all tokens of the file; and a note on how they were read.

    Args:
        path: of the file.
        held: `router_logits`, one (T, E) or (B, S, E) for each layer, and perhaps `attention_mask`.
        missing: with `top_k`.

    Raises:
        ValueError: top_k is not given or too large, or a mask does not fit.
    """
    if missing.top_k is None:
        raise ValueError(
            f"{path} has logits, which do not say how many experts a token gets: give --top-k"
        )
    layers = [logits for logits in held[KEY] if logits is not None]
    loads = {
        f"layer {i}": _load(logits, held.get("attention_mask"), path, missing.top_k)
        for i, logits in enumerate(layers)
    }
    run = as_run(path, "router logits of Transformers", {1: loads}, missing.top_k)
    return run, f"{path.name}: experts are the top {missing.top_k} of the logits, without a bias."


def holds_logits(value: Any) -> bool:
    """Whether this is one tensor (T, E) or (B, S, E) of real numbers for each layer."""
    return (
        isinstance(value, Sequence)
        and any(layer is not None for layer in value)
        and all(
            layer is None
            or (isinstance(layer, Tensor) and layer.dim() in (2, 3) and layer.is_floating_point())
            for layer in value
        )
    )


def _load(logits: Tensor, mask: Any, path: Path, top_k: int) -> Load:
    experts = logits.shape[-1]
    if not 1 <= top_k <= experts:
        raise ValueError(f"--top-k {top_k}: {path} has {experts} experts, so 1 to {experts} fit")
    rows = logits.float().reshape(-1, experts)
    if mask is not None:
        real = real_tokens(mask).reshape(-1)
        if len(real) != len(rows):
            raise ValueError(
                f"{path} has an attention_mask for {len(real)} tokens and logits of {len(rows)}"
            )
        rows = rows[real]
    if not rows.isfinite().all():
        raise ValueError(f"{path} has logits that are NaN or infinite")
    scores = rows.softmax(dim=-1).sum(dim=0)
    return Load(counted(rows.topk(top_k).indices, experts), len(rows), scores)
