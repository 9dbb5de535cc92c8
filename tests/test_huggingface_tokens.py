"""Which tokens are real, and where sequences end: every way in which a batch may say so."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

import moebalance as mb
from families import tiny, tokens
from moebalance.integrations.huggingface.tokens import Layout, Source, layout, pack
from training import FixedPrice, agree

LENGTHS = [12, 5, 9, 3]
REAL = sum(LENGTHS)
PAD = 0


def rows() -> list[Tensor]:
    return [tokens(1, length, seed=20 + row)[0] for row, length in enumerate(LENGTHS)]


def pad(parts: list[Tensor], value: int = PAD) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)


def padded() -> dict[str, Tensor]:
    mask = pad([torch.ones_like(row) for row in rows()])
    return {"input_ids": pad(rows()), "attention_mask": mask, "labels": pad(rows(), -100)}


def packed(tail: int = 0) -> dict[str, Tensor]:
    """All rows in one, with their numbers 1, 2, … and 0 for so much padding behind."""
    fill = torch.zeros(tail, dtype=torch.long)
    numbers = [torch.full((length,), row + 1) for row, length in enumerate(LENGTHS)]
    places = [torch.arange(length) for length in LENGTHS]
    return {
        "input_ids": torch.cat([*rows(), fill])[None],
        "numbers": torch.cat([*numbers, fill])[None],
        "position_ids": torch.cat([*places, fill])[None],
        "labels": torch.cat([*rows(), fill - 100])[None],
    }


def block_mask(numbers: Tensor, kind: str) -> Tensor:
    """(1, 1, S, S): who sees whom, in one of the ways to say so."""
    same = (numbers[:, None] == numbers[..., None]) & (numbers[:, None] > 0)
    seen = (same & torch.ones_like(same).tril())[:, None]
    if kind == "additive":
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"bool": seen, "float": seen.float(), "int": seen.int(), "3-D": seen[:, 0]}[kind]


def of(given: dict[str, Any], *, pad: int | None = None, **settings: Any) -> Layout:
    return layout([Source(given)], pad=pad, **settings)


def count(given: dict[str, Any], **settings: Any) -> int:
    found = of(given, **settings)
    size = given["input_ids"].numel()
    return size if found.mask is None else int(found.mask.sum())


@pytest.mark.parametrize("kind", ["bool", "additive", "float", "int", "3-D"])
@pytest.mark.situation(
    "Tokens",
    "4-D and dictionary attention masks",
    "works: padding is read from the diagonal",
)
def test_a_mask_of_more_axes_tells_padding_by_its_diagonal(kind: str) -> None:
    batch = packed(tail=4)
    mask = block_mask(batch["numbers"], kind)
    assert count({"input_ids": batch["input_ids"], "attention_mask": mask}) == REAL
    by_type = {"sliding_attention": mask, "full_attention": mask}
    assert count({"input_ids": batch["input_ids"], "attention_mask": by_type}) == REAL


SAID: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mask": ({k: v for k, v in padded().items() if k != "labels"}, {}),
    "pad id": ({"input_ids": padded()["input_ids"]}, {"pad": PAD}),
    "pad id on the left": ({"input_ids": padded()["input_ids"].flip(1)}, {"pad": PAD}),
    "pad id and labels": (
        {"input_ids": padded()["input_ids"], "labels": padded()["labels"]},
        {"pad": PAD},
    ),
    "labels": ({"input_ids": padded()["input_ids"], "labels": padded()["labels"]}, {}),
    "numbered mask": (
        {"input_ids": packed(4)["input_ids"], "attention_mask": packed(4)["numbers"]},
        {},
    ),
    "cu_seq_lens": (
        {
            "input_ids": packed(4)["input_ids"],
            "cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        },
        {},
    ),
}


@pytest.mark.parametrize("way", SAID)
def test_real_tokens_are_found_however_a_batch_says_so(way: str) -> None:
    given, settings = SAID[way]
    assert given["input_ids"].numel() > REAL
    assert count(given, **settings) == REAL


def test_a_prompt_without_labels_is_no_padding() -> None:
    batch = padded()
    batch["labels"][:, :2] = -100
    del batch["attention_mask"]
    assert count(batch, pad=PAD) == count(batch) == REAL
    batch["labels"][1] = -100  # a row of a prompt alone
    assert count(batch, pad=PAD) == REAL


def test_a_token_that_is_also_the_padding_one_is_real_within_a_row() -> None:
    ids = torch.tensor([[5, PAD, 6, PAD], [5, 6, PAD, PAD]])
    assert count({"input_ids": ids}, pad=PAD) == 5
    labelled = {"input_ids": ids, "labels": torch.tensor([[5, 0, 6, 0], [5, 6, 0, -100]])}
    assert count(labelled, pad=PAD) == 7


def test_of_masks_of_several_modules_one_of_two_axes_is_believed() -> None:
    """An outer model makes masks of its own for the inner one."""
    batch = padded()
    inner = {"inputs_embeds": torch.zeros(4, 12, 8), "attention_mask": torch.ones(4, 1, 12, 12)}
    found = layout([Source(inner), Source(batch)], pad=None)
    assert found.mask.sum() == REAL


@pytest.mark.parametrize("way", ["position_ids", "numbers", "additive", "cu_seq_lens_q", "seq_idx"])
def test_packed_sequences_are_told_apart(way: str) -> None:
    batch = packed(tail=4)
    given = {
        "position_ids": {"position_ids": batch["position_ids"], "labels": batch["labels"]},
        "numbers": {"attention_mask": batch["numbers"]},
        "additive": {"attention_mask": block_mask(batch["numbers"], "additive")},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, *LENGTHS]).cumsum(0)},
        "seq_idx": {"seq_idx": batch["numbers"], "labels": batch["labels"]},
    }[way]
    packing = pack(of({"input_ids": batch["input_ids"], **given}, packed=True))
    assert packing.sequences == len(LENGTHS)
    assert packing.valid.view(4, 12).sum(dim=1).tolist() == LENGTHS
    ids = batch["input_ids"][0][packing.places] * packing.valid
    assert torch.equal(ids.view(4, 12), pad(rows()))


FLAT = DataCollatorWithFlattening(return_flash_attn_kwargs=False)
FLASH = DataCollatorWithFlattening(return_flash_attn_kwargs=True)


@pytest.mark.parametrize("kind", ["ones", "none", "numbers"])
@pytest.mark.situation(
    "Tokens",
    "Packs filled up under a mask of ones (LLaMA-Factory's `packing`)",
    "works: what fills them has neither position nor label, and is left out",
)
def test_what_fills_a_pack_is_left_out_whatever_the_mask_says(kind: str) -> None:
    batch = packed(tail=4)
    numbers = batch.pop("numbers")
    masks = {"ones": torch.ones_like(numbers), "none": None, "numbers": numbers}
    found = of({**batch, "attention_mask": masks[kind]}, pad=PAD)
    assert found.mask is not None
    assert found.mask.tolist() == [True] * REAL + [False] * 4
    labelled = {**batch, "labels": torch.zeros_like(numbers), "attention_mask": masks["ones"]}
    assert of(labelled, pad=PAD).mask is None


@pytest.mark.parametrize("collate", [FLAT, FLASH], ids=["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize(
    "make",
    [
        lambda strength: FixedPrice(strength),
        lambda strength: mb.SequenceLoss(strength=strength),
        lambda strength: mb.Together(mb.SequenceLoss(strength=strength), mb.LossFree()),
        lambda strength: mb.PhiBalancing(strength=strength),
    ],
    ids=["fixed", "sequence", "together", "phi"],
)
@pytest.mark.situation(
    "Tokens",
    "Packed rows under a sequence-wise loss",
    "works: charged as the same rows padded",
)
def test_packed_rows_are_charged_as_padded_ones(make: Any, collate: Any) -> None:
    both = {
        "padded": padded(),
        "packed": dict(
            collate([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows()])
        ),
    }
    terms, counts = {}, {}
    for name, batch in both.items():
        gradients = []
        for strength in (1.0, 0.0):
            model = tiny("qwen3_moe")
            balancing = mb.attach(model, make(strength))
            model(**batch).loss.backward()
            gradients.append(model.model.layers[0].mlp.gate.weight.grad)
            balancing.step()
            layer = next(iter(balancing.layers.values()))
            counts[name] = layer.last_sums.counts, layer.last_sums.tokens
        terms[name] = gradients[0] - gradients[1]
    assert agree(terms["packed"], terms["padded"], 1e-4)
    assert torch.equal(counts["packed"][0], counts["padded"][0])
    assert counts["packed"][1] == counts["padded"][1] == REAL


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's own, of graph breaks
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_packed_sequences_are_told_apart_in_a_compiled_model() -> None:
    batch = dict(FLAT([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows()]))
    found = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        model = tiny("qwen3_moe", num_hidden_layers=1)
        mb.attach(model, mb.SequenceLoss(strength=1.0))
        call = model if backend is None else torch.compile(model, backend=backend)
        call(**batch).loss.backward()
        found.append(model.model.layers[0].mlp.gate.weight.grad)
    assert agree(found[1], found[0], 1e-5)


@pytest.mark.parametrize("family", ["switch_transformers", "nllb-moe"])
@pytest.mark.situation(
    "Tokens",
    "A decoder whose collator gives no mask",
    "works: counted by its labels",
)
def test_a_decoder_without_a_mask_is_counted_by_its_labels(family: str) -> None:
    """As `DataCollatorForSeq2Seq` leaves it."""
    model, ids = tiny(family), tokens()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids.masked_fill(torch.arange(12) >= torch.tensor([[9], [5]]), -100)
    balancing = mb.attach(model, mb.NoBalancing())
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    balancing.step()
    found = {name: layer.last_sums.tokens.item() for name, layer in balancing.layers.items()}
    assert {n for name, n in found.items() if "encoder" in name} == {19}
    assert {n for name, n in found.items() if "decoder" in name} == {14}


def test_tokens_of_images_and_of_text_are_counted_by_their_own_routers() -> None:
    model, ids = tiny("ernie4_5_vl_moe_text"), tokens()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    images = torch.zeros_like(ids)
    images[:, 2:5] = 1
    both = mb.Together(mb.SequenceLoss(strength=0.1), mb.LossFree())
    balancing = mb.attach(model, both)
    for given in (images, None):
        out = model(input_ids=ids, attention_mask=mask, moe_mm_token_type_ids=given)
        out.last_hidden_state.square().mean().backward()
        balancing.step()
        found = {name: layer.last_sums.tokens.item() for name, layer in balancing.layers.items()}
        seen = 6 if given is not None else 0
        assert {n for name, n in found.items() if "vision" in name} == {seen}
        assert {n for name, n in found.items() if "text" in name} == {19 - seen}


@pytest.mark.situation(
    "Tokens",
    "A model called through one of its parts (`model.thinker(…)`)",
    "works: padding and scale are known",
)
def test_a_model_called_through_one_of_its_parts_knows_padding_and_scale() -> None:
    """As Qwen-Omni's thinker is trained, or a language model within a vision model."""
    model, ids = tiny("qwen3_vl_moe"), tokens()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    balancing = mb.attach(model, mb.PhiBalancing())
    whole = model(input_ids=ids, attention_mask=mask).logits
    part = model.model.language_model(input_ids=ids, attention_mask=mask).last_hidden_state
    balancing.discard()
    part.square().mean().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 19
    whole.square().mean().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == 19


def test_the_loss_of_a_part_is_followed() -> None:
    class Outer(type(tiny("mixtral"))):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.thinker = tiny("mixtral")

    ids = tokens()
    model = Outer(tiny("mixtral").config)
    model.model.requires_grad_(False)
    balancing = mb.attach(model, mb.PhiBalancing())
    (model.thinker(input_ids=ids, labels=ids).loss / 8).backward()
    assert {layer.loss_scale.item() for layer in balancing.layers.values()} == {0.125}


def test_padding_between_training_forwards_does_not_leak(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = tiny("mixtral"), padded()
    balancing = mb.attach(model, mb.PhiBalancing())
    loss = model(**batch).loss
    with torch.no_grad():  # another forward of the training model, before the backward
        model(input_ids=tokens(3, 5), attention_mask=torch.ones(3, 5))
    loss.backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == REAL
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_padding_of_a_call_that_was_interrupted_does_not_leak() -> None:
    model, ids = tiny("qwen3_moe"), tokens()
    balancing = mb.attach(model, mb.PhiBalancing())
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=ids, attention_mask=mask, labels=ids)
    hook.remove()
    model.model(input_ids=ids).last_hidden_state.square().mean().backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == ids.numel()
