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


@pytest.mark.parametrize("how", ["without labels", "with a coefficient of 0"])
def test_router_logits_that_are_asked_for_come_without_the_models_own_loss(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny("qwen3_moe"), tokens()
    given = {"input_ids": ids, "labels": None if how == "without labels" else ids}
    if how == "with a coefficient of 0":
        model.router_aux_loss_coef = model.config.router_aux_loss_coef = 0.0
    expected = model(**given, output_router_logits=True).router_logits
    balancing = mb.attach(model, mb.PhiBalancing())
    out = model(**given, output_router_logits=True)
    for mine, theirs in zip(out.router_logits, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert out.aux_loss is None
    (out.logits.square().mean() if out.loss is None else out.loss).backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == ids.numel()
    assert "output_router_logits" not in caplog.text


def test_router_logits_that_would_bring_the_models_own_loss_are_left_out_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, ids = tiny("qwen3_moe"), tokens()
    model.router_aux_loss_coef = 0.5
    alone = model(input_ids=ids, labels=ids).loss
    mb.attach(model, mb.PhiBalancing())
    for _ in range(2):
        out = model(input_ids=ids, labels=ids, output_router_logits=True)
        torch.testing.assert_close(out.loss, alone)
        assert out.router_logits is None
    assert caplog.text.count("output_router_logits=True was left out") == 1
    assert model.eval()(input_ids=ids, output_router_logits=True).router_logits is not None
