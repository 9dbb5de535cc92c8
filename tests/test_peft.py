"""PEFT: attaching before and after it, routers that it freezes, adapts or copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import moebalance as mb
from families import tiny
from test_trl import PLAIN, tokenizer, words
from training import (
    BalanceCallback,
    FixedPrice,
    Rows,
    agree,
    light_collections,
    padded,
    plain,
    router_gradient,
    term_gradients,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing:FutureWarning",  # PEFT's and TRL's own
)

ATTENTION: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
ADAPTED = {**ATTENTION, "target_parameters": ["mlp.gate.weight"]}
COPIED = {**ATTENTION, "modules_to_save": ["gate"]}
both_ways = pytest.mark.parametrize("router", [ADAPTED, COPIED], ids=["adapted", "copied"])


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


def peft(settings: dict[str, Any], **changes: Any) -> PeftModel:
    """The same adapters at every call."""
    model = tiny("mixtral", **changes)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(**settings)).train()


def ragged() -> dict[str, Tensor]:
    data = Rows(4, [12, 5, 9, 7])
    return padded([data[row] for row in range(4)])


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_adapted_router_learns_from_the_term_as_the_whole_router_would(before: bool) -> None:
    """The whole router's gradient G gives lora_B the gradient c·G Aᵀ, and lora_A none at first."""
    whole, found = [], []
    for strength in (1.0, 0.0):
        model = tiny("mixtral")
        mb.attach(model, FixedPrice(strength))
        (model(**ragged()).loss / 4).backward()
        whole.append(model.model.layers[0].mlp.gate.weight.grad)
        if before:
            inner = tiny("mixtral")
            balancing = mb.attach(inner, FixedPrice(strength))
            torch.manual_seed(1)
            model = get_peft_model(inner, LoraConfig(**ADAPTED)).train()
        else:
            model = peft(ADAPTED)
            balancing = mb.attach(model, FixedPrice(strength))
        (model(**ragged()).loss / 4).backward()
        adapter = model.get_submodule("base_model.model.model.layers.0.mlp.gate")
        found.append(adapter.lora_B["default"].weight.grad)
        balancing.step()
        assert balancing.metrics()["tokens"] == 12 + 5 + 9 + 7
    scaling, down = adapter.scaling["default"], adapter.lora_A["default"].weight
    assert agree(found[0] - found[1], scaling * (whole[0] - whole[1]) @ down.T, 1e-4)


def test_a_copied_router_learns_from_the_term_as_the_original_would() -> None:
    found = []
    for strength in (1.0, 0.0):
        for model in (tiny("mixtral"), peft(COPIED)):
            balancing = mb.attach(model, FixedPrice(strength))
            (model(**ragged()).loss / 4).backward()
            balancing.step()
            assert balancing.metrics()["tokens"] == 12 + 5 + 9 + 7
            found.append(router_gradient(model))
    assert agree(found[1] - found[3], found[0] - found[2], 1e-4)


@both_ways
def test_strength_means_the_same_under_accumulation(tmp_path: Path, router: dict[str, Any]) -> None:
    make = plain(tmp_path, Rows(8))
    for own_loss in ({}, {"label_smoothing_factor": 0.1}):
        gradients = [
            term_gradients(
                make,
                model=lambda: peft(router),
                per_device_train_batch_size=8 // split,
                gradient_accumulation_steps=split,
                **own_loss,
            )[0]
            for split in (1, 4)
        ]
        assert agree(gradients[1], gradients[0])


def test_a_frozen_router_is_refused_with_the_two_ways_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"frozen.*modules_to_save or target_parameters"):
        mb.attach(peft(ATTENTION), mb.PhiBalancing())
    with pytest.raises(ValueError, match=r"frozen.*modules_to_save or target_parameters"):
        plain(tmp_path, Rows(8))(peft(ATTENTION), [BalanceCallback(mb.PhiBalancing())])


def test_a_frozen_router_is_balanced_by_selection(tmp_path: Path) -> None:
    callback = BalanceCallback(mb.LossFree(speed=0.01))
    plain(tmp_path, Rows(8), max_steps=2)(peft(ATTENTION), [callback]).train()
    assert callback.balancing.metrics()["price_spread"] > 0


def test_a_router_that_was_copied_after_attaching_is_refused(tmp_path: Path) -> None:
    model = tiny("mixtral")
    balancing = mb.attach(model, mb.PhiBalancing())
    copied = get_peft_model(model, LoraConfig(**COPIED))
    with pytest.raises(ValueError, match="attach to what get_peft_model returned"):
        plain(tmp_path, Rows(8))(copied, [BalanceCallback(balancing)]).train()
    copied(**ragged()).loss.backward()
    with pytest.raises(RuntimeError, match="No token was counted"):
        balancing.step()


def test_nothing_is_said_of_a_reference_that_passes_by_the_copied_router(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PEFT's reference policy calls the original of each router, and nobody balances that one."""
    model, batch = peft(COPIED), ragged()
    balancing = mb.attach(model, mb.PhiBalancing())
    with torch.no_grad(), model.disable_adapter():
        model(**batch)
        model.eval()(**batch)
    model.train()(**batch).loss.backward()
    balancing.step()
    assert balancing.metrics()["tokens"] == batch["attention_mask"].sum()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


@both_ways
def test_adapters_are_saved_without_a_key_of_ours_and_training_resumes(
    tmp_path: Path, router: dict[str, Any]
) -> None:
    def run(folder: Path, steps: int, resume: bool = False) -> tuple[PeftModel, mb.Balancing]:
        model, callback = peft(router), BalanceCallback(mb.PhiBalancing(strength=0.1))
        make = plain(folder, Rows(8), save_strategy="steps", save_steps=2, learning_rate=1e-2)
        schedule = {"lr_scheduler_type": "constant", "max_steps": steps}
        make(model, [callback], **schedule).train(resume_from_checkpoint=resume)
        return model, callback.balancing

    model, whole = run(tmp_path / "whole", 4)
    run(tmp_path / "halves", 2)
    again, resumed = run(tmp_path / "halves", 4, resume=True)
    assert resumed.steps == 4
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    saved = tmp_path / "whole" / "checkpoint-4"
    assert (saved / mb.huggingface.STATE_FILE).is_file()
    peft(router).save_pretrained(tmp_path / "fresh")
    adapters = "adapter_model.safetensors"
    assert load_file(saved / adapters).keys() == load_file(tmp_path / "fresh" / adapters).keys()
    whole.detach()
    loaded = PeftModel.from_pretrained(tiny("mixtral"), saved)
    torch.testing.assert_close(loaded(**ragged()).loss, model(**ragged()).loss)


def sft(folder: Path, adapters: dict[str, Any], callback: BalanceCallback, **changes: Any) -> Any:
    return SFTTrainer(
        tiny("mixtral"),
        SFTConfig(str(folder), **{**PLAIN, **changes}),
        train_dataset=Dataset.from_dict({"input_ids": [row.tolist() for row in Rows(8).rows]}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**adapters),
        callbacks=[callback],
    )


def dpo(folder: Path, adapters: dict[str, Any], callback: BalanceCallback, **changes: Any) -> Any:
    rows = [{name: words(3 * row + k, 5) for k, name in enumerate(NAMES)} for row in range(8)]
    return DPOTrainer(
        tiny("mixtral"),
        args=DPOConfig(str(folder), **{**PLAIN, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**adapters),
        callbacks=[callback],
    )


NAMES = ("prompt", "chosen", "rejected")
trl = pytest.mark.parametrize("make", [sft, dpo])


@trl
@both_ways
@pytest.mark.parametrize("reentrant", [False, True], ids=["recompute", "reentrant"])
def test_trl_wraps_first_and_the_callback_attaches_to_what_it_wrapped(
    tmp_path: Path, make: Callable[..., Trainer], router: dict[str, Any], reentrant: bool
) -> None:
    """DPO's reference is the same model without adapters: its tokens are not counted."""
    callback = BalanceCallback(mb.PhiBalancing())
    trainer = make(
        tmp_path,
        router,
        callback,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert log["moe/tokens"] == log["num_tokens"] > 0
    assert "aux_loss" not in log


@trl
def test_trl_with_adapters_on_attention_alone_is_refused(
    tmp_path: Path, make: Callable[..., Trainer]
) -> None:
    with pytest.raises(ValueError, match=r"frozen.*modules_to_save or target_parameters"):
        make(tmp_path, ATTENTION, BalanceCallback(mb.PhiBalancing()))
