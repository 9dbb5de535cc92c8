"""BalanceCallback: attaching by itself, and refusing what would balance nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

import moebalance as mb
from families import tiny
from training import BalanceCallback, Rows, arguments, light_collections


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


def trainer_of(folder: Path, model: Any, *callbacks: Any, **changes: Any) -> Trainer:
    return Trainer(
        model, arguments(folder, **changes), train_dataset=Rows(8), callbacks=list(callbacks)
    )


def gate(model: PreTrainedModel) -> torch.Tensor:
    return model.model.layers[0].mlp.gate.weight


def test_given_a_method_it_attaches_when_the_trainer_is_made(tmp_path: Path) -> None:
    method = mb.PhiBalancing(strength=0.1)
    by_hand, by_itself = tiny("mixtral"), tiny("mixtral")
    trainer_of(tmp_path, by_hand, BalanceCallback(mb.attach(by_hand, method)), max_steps=2).train()
    callback = BalanceCallback(method)
    with pytest.raises(RuntimeError, match="has no model yet"):
        _ = callback.balancing
    trainer = trainer_of(tmp_path, by_itself, callback, max_steps=2)
    assert len(callback.balancing.layers) == 2
    trainer.train()
    assert callback.balancing.steps == 2
    assert torch.equal(gate(by_hand), gate(by_itself))


def test_added_later_it_attaches_when_training_begins_and_stays(tmp_path: Path) -> None:
    model = tiny("mixtral")
    trainer = trainer_of(tmp_path, model)
    callback = BalanceCallback(mb.PhiBalancing())
    trainer.add_callback(callback)
    trainer.train()
    trainer.train()
    assert callback.balancing.steps == 2
    with pytest.raises(ValueError, match="balanced already"):
        mb.attach(model, mb.PhiBalancing())
    callback.balancing.detach()
    mb.attach(model, mb.PhiBalancing()).detach()


def test_detached_by_its_user_it_attaches_anew(tmp_path: Path) -> None:
    callback = BalanceCallback(mb.PhiBalancing())
    trainer = trainer_of(tmp_path, tiny("mixtral"), callback)
    trainer.train()
    first = callback.balancing
    first.detach()
    trainer.train()
    assert callback.balancing is not first
    assert callback.balancing.steps == 1


def test_added_later_to_a_compiled_model_it_is_refused(tmp_path: Path) -> None:
    model = tiny("mixtral")
    model.compile(backend="eager")
    trainer = trainer_of(tmp_path, model)
    trainer.add_callback(BalanceCallback(mb.PhiBalancing()))
    with pytest.raises(ValueError, match="attach first, then compile"):
        trainer.train()


def test_a_model_made_anew_for_each_training_is_attached_to_anew(tmp_path: Path) -> None:
    callback = BalanceCallback(mb.PhiBalancing())
    trainer = Trainer(
        None,
        arguments(tmp_path),
        train_dataset=Rows(4),
        callbacks=[callback],
        model_init=lambda: tiny("mixtral"),
    )
    first = callback.balancing
    trainer.train()
    assert callback.balancing is not first
    assert callback.balancing.steps == 1
    assert first.steps == 0


def test_a_handle_on_another_model_is_refused(tmp_path: Path) -> None:
    balancing = mb.attach(tiny("mixtral"), mb.PhiBalancing())
    trainer = trainer_of(tmp_path, tiny("mixtral"), BalanceCallback(balancing))
    with pytest.raises(ValueError, match=r"not part of the model .* BalanceCallback\(Phi"):
        trainer.train()


def test_a_handle_that_was_detached_is_refused(tmp_path: Path) -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.PhiBalancing())
    balancing.detach()
    with pytest.raises(ValueError, match="not part of the model"):
        trainer_of(tmp_path, model, BalanceCallback(balancing)).train()


def test_a_model_of_own_balanced_routers_is_accepted(tmp_path: Path) -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 4)
            self.router = mb.BalancedRouter(mb.PhiBalancing(), 4, 2)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
            weights, experts = self.router(self.gate(self.embed(input_ids)))
            return {"loss": (weights * experts).mean()}

    model = Own()
    balancing = mb.attach(model)
    trainer_of(tmp_path, model, BalanceCallback(balancing)).train()
    assert balancing.steps == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
def test_a_router_frozen_after_attaching_is_refused_where_it_has_to_learn(tmp_path: Path) -> None:
    """As PEFT does when it is told nothing of the router."""

    def wrapped(method: mb.Method) -> Trainer:
        model = tiny("mixtral")
        balancing = mb.attach(model, method)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
        return trainer_of(tmp_path, adapted, BalanceCallback(balancing))

    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate was frozen .* target_parameters"):
        wrapped(mb.PhiBalancing()).train()
    wrapped(mb.LossFree()).train()


def test_replicas_of_data_parallel_are_refused(tmp_path: Path) -> None:
    class Two(TrainingArguments):
        n_gpu = 2

    callback = BalanceCallback(mb.attach(tiny("mixtral"), mb.PhiBalancing()))
    with pytest.raises(RuntimeError, match="CUDA_VISIBLE_DEVICES"):
        callback.on_train_begin(Two(str(tmp_path)), None, None, model=tiny("mixtral"))


def test_what_is_neither_handle_nor_method_is_refused() -> None:
    with pytest.raises(TypeError, match="or a Method such as"):
        BalanceCallback(tiny("mixtral"))
