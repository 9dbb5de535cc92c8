"""A Trainer and a model whose routers are plain modules, named to `attach`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import moebalance as mb
from named_models import WIDTH, Layer, attach
from training import BalanceCallback, Rows, arguments, light_collections, padded


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


class Text(nn.Module):
    """A language model with gates of its own, which returns its loss."""

    def __init__(self, vocabulary: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.layer = Layer()
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        x = self.embedding(input_ids)
        logits = self.head(x + self.layer(x))
        pairs = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"loss": nn.functional.cross_entropy(*pairs, ignore_index=-100), "logits": logits}


def trained(folder: Path, strength: float, split: int) -> tuple[Tensor, mb.Balancing]:
    torch.manual_seed(0)
    model = Text()
    balancing = attach(model, method=mb.SwitchLoss(strength), mask="attention_mask")
    settings = arguments(
        folder,
        per_device_train_batch_size=8 // split,
        gradient_accumulation_steps=split,
        optim="sgd",
        learning_rate=1.0,
    )
    before = model.layer.gate.weight.detach().clone()
    trainer = Trainer(
        model,
        settings,
        train_dataset=Rows(8, [12, 7, 9, 12, 5, 12, 3, 8]),
        data_collator=padded,
        callbacks=[BalanceCallback(balancing)],
    )
    trainer.train()
    return model.layer.gate.weight.detach() - before, balancing


@pytest.mark.parametrize("split", [1, 4])
def test_a_callback_drives_a_model_whose_routers_were_named(tmp_path: Path, split: int) -> None:
    balanced, balancing = trained(tmp_path, 0.5, split)
    alone, _ = trained(tmp_path, 0.0, split)
    assert balancing.steps == 1
    assert balancing.metrics()["tokens"] == 12 + 7 + 9 + 12 + 5 + 12 + 3 + 8
    assert (balanced - alone).norm() > 0.01 * alone.norm()


def test_a_named_model_that_was_copied_is_not_the_one_that_is_balanced(tmp_path: Path) -> None:
    balancing = attach(Text())
    trainer = Trainer(
        Text(),
        arguments(tmp_path),
        train_dataset=Rows(8),
        data_collator=padded,
        callbacks=[BalanceCallback(balancing)],
    )
    with pytest.raises(ValueError, match="not part of the model that is about to be trained"):
        trainer.train()


def test_a_callback_with_a_method_says_how_to_attach_to_a_model_of_ones_own(
    tmp_path: Path,
) -> None:
    with pytest.raises(TypeError, match=r"with routers=… for plain gates, and give what it"):
        Trainer(Text(), arguments(tmp_path), callbacks=[BalanceCallback(mb.PhiBalancing())])
