"""Attaching to Transformers models: what they return, and the losses that are made from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moebalance as mb
from families import tiny, tokens

CHECKPOINTING = {"plain": None, "recompute": False, "reentrant": True}


def pooled(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """One vector a sequence, as contrastive tuning makes it."""
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1].mean(1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lengths", [(8, 8), (8, 12)], ids=["alike", "of-two-lengths"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_loss_from_hidden_states_of_two_forwards_counts_each_under_its_own_mask(
    checkpointing: str, lengths: tuple[int, int]
) -> None:
    model = tiny("qwen3_moe")
    balancing = mb.attach(model, mb.PhiBalancing())
    if CHECKPOINTING[checkpointing] is not None:
        model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
        model.enable_input_require_grads()
    batches = [tokens(2, length, seed=length) for length in lengths]
    masks = [torch.ones_like(ids) for ids in batches]
    masks[0][0, 5:] = masks[1][1, 3:] = 0
    query, answer = (pooled(model, *each) for each in zip(batches, masks, strict=True))
    (query @ answer.T).square().sum().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == sum(mask.sum().item() for mask in masks)
