"""TRL's trainers, which make the loss themselves: strength, counts, native losses, resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import moebalance as mb
from families import VOCABULARY, tiny, tokens
from training import (
    QUIET,
    BalanceCallback,
    FixedPrice,
    Rows,
    agree,
    compiled_and_eager,
    light_collections,
    plain,
    router_gradient,
    scaled,
    term_gradients,
)

pytestmark = pytest.mark.filterwarnings(
    # TRL 1.16 still uses what Transformers 5.23 renames.
    "ignore:`(is_)?gradient_checkpointing:FutureWarning",
)

PLAIN = {**QUIET, "bf16": False, "activation_checkpointing": False}
LENGTHS = [60, 25, 22, 58, 23, 27, 44, 31]
"""Of rows so unlike that micro-batches differ about twofold in their tokens."""


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]
    table = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(table, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def words(seed: int, length: int) -> str:
    return " " + " ".join(f"w{number}" for number in tokens(1, length, seed=seed)[0].tolist())


def in_parts(split: int) -> dict[str, Any]:
    """Settings for a step of eight rows in so many micro-batches."""
    sizes = {"per_device_train_batch_size": 8 // split, "gradient_accumulation_steps": split}
    return {**PLAIN, **sizes}


def sft(
    folder: Path, lengths: list[int], *, hidden: int = 0, kind: Any = SFTTrainer, **changes: Any
) -> Any:
    """Trainer of rows of these lengths, of which every second one shows so many labels less."""
    columns: dict[str, Any] = {
        "input_ids": [row.tolist() for row in Rows(len(lengths), lengths).rows]
    }
    if hidden:
        columns["completion_mask"] = [
            [int(place >= hidden * (row % 2)) for place in range(length)]
            for row, length in enumerate(lengths)
        ]
        changes = {"completion_only_loss": True, **changes}

    def make(model: Any, callbacks: list[Any], split: int = 1, **settings: Any) -> Trainer:
        own = {**in_parts(split), "train_sampling_strategy": "sequential", **changes}
        return kind(
            model,
            SFTConfig(str(folder), **{**own, **settings}),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )

    return make


def dpo(folder: Path, *, ragged: bool = False, kind: Any = DPOTrainer, **changes: Any) -> Any:
    rows = [
        {
            "prompt": words(row, 3 + row * ragged),
            "chosen": words(20 + row, 5),
            "rejected": words(40 + row, 8 - row * ragged),
        }
        for row in range(8)
    ]

    def make(model: Any, callbacks: list[Any], split: int = 1, **settings: Any) -> Trainer:
        own = {**in_parts(split), "train_sampling_strategy": "sequential", **changes}
        return kind(
            model,
            ref_model=tiny("mixtral"),
            args=DPOConfig(str(folder), **{**own, **settings}),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )

    return make


def grpo(folder: Path, *, kind: Any = GRPOTrainer, **changes: Any) -> Any:
    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    def make(model: Any, callbacks: list[Any], split: int = 1, **settings: Any) -> Trainer:
        torch.manual_seed(7)  # the same completions however the step is split
        return kind(
            model,
            reward_funcs=reward,
            args=GRPOConfig(
                str(folder),
                num_generations=4,
                max_completion_length=6,
                **{**in_parts(split), **changes, **settings},
            ),
            train_dataset=Dataset.from_list([{"prompt": words(row, 5)} for row in range(4)]),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )

    return make


MAKERS: dict[str, Callable[..., Any]] = {
    "sft": lambda folder, **changes: sft(folder, [12] * 8, **changes),
    "dpo": dpo,
    "grpo": grpo,
}
every_trainer = pytest.mark.parametrize("name", MAKERS)


def log_of(trainer: Trainer) -> dict[str, float]:
    return next(entry for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sft", {}),
        ("sft", {"loss_type": "dft"}),
        pytest.param(
            "sft",
            {"label_smoothing_factor": 0.1},
            marks=pytest.mark.filterwarnings("ignore:`label_smoothing_factor`:FutureWarning"),
        ),
        ("dpo", {}),
        ("grpo", {"loss_type": "dapo", "generation_kwargs": {"min_new_tokens": 6}}),
        ("grpo", {"loss_type": "grpo", "generation_kwargs": {"min_new_tokens": 6}}),
    ],
    ids=["sft", "sft-dft", "sft-smoothed", "dpo", "grpo-dapo", "grpo-grpo"],
)
def test_strength_means_the_same_however_a_step_is_split(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    make = MAKERS[name](tmp_path, **changes)
    (whole,) = term_gradients(make)
    (split,) = term_gradients(make, split=4)
    assert agree(split, whole)


def test_sft_weighs_ragged_micro_batches_by_their_labels(tmp_path: Path) -> None:
    (whole,) = term_gradients(sft(tmp_path, LENGTHS))
    for split in (2, 8):
        (parts,) = term_gradients(sft(tmp_path, LENGTHS), split=split)
        assert abs(parts.norm() / whole.norm() - 1) < 5e-3
    (same,) = term_gradients(
        plain(tmp_path, Rows(8, LENGTHS)),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
    )
    assert agree(parts, same, 1e-4)  # as the plain Trainer does


def test_sft_on_completions_alone_weighs_micro_batches_by_their_labels(tmp_path: Path) -> None:
    class Hidden(Rows):
        def __getitem__(self, item: int) -> dict[str, Tensor]:
            row = self.rows[item]
            shown = torch.arange(len(row)) >= 9 * (item % 2)
            return {"input_ids": row, "labels": row.where(shown, -100)}

    (parts,) = term_gradients(sft(tmp_path, [12] * 8, hidden=9), split=8)
    (same,) = term_gradients(
        plain(tmp_path, Hidden(8)), per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    assert agree(parts, same, 1e-4)


def test_equal_weights_would_change_the_strength_of_ragged_micro_batches(tmp_path: Path) -> None:
    """The control for the test above: its bound is one that can be missed."""
    make = sft(tmp_path, LENGTHS, loss_type="dft")
    (whole,), (parts,) = term_gradients(make), term_gradients(make, split=8)
    assert abs(parts.norm() / whole.norm() - 1) > 5e-3


@every_trainer
def test_a_gradient_scaler_changes_nothing(tmp_path: Path, name: str) -> None:
    kinds = {"sft": SFTTrainer, "dpo": DPOTrainer, "grpo": GRPOTrainer}
    make = MAKERS[name](tmp_path)
    (whole,) = term_gradients(make, split=2)
    (parts,) = term_gradients(MAKERS[name](tmp_path, kind=scaled(kinds[name])), split=2)
    assert agree(parts, whole)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_sft_weighs_micro_batches_by_their_labels_compiled(tmp_path: Path) -> None:
    compiling = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    # Labels are missing and no tokens, so that no second shape has to be compiled.
    make = partial(sft(tmp_path, [12] * 8, hidden=9), split=8)
    compiled, eager = compiled_and_eager(make, compiling)
    assert agree(compiled, eager)
    equal, _ = compiled_and_eager(make, {"loss_type": "dft"})
    assert not agree(equal, eager)


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_a_short_last_step_of_an_epoch_keeps_its_strength(tmp_path: Path, loss_type: str) -> None:
    """Six rows by fours, one at a time: the second step has two micro-batches."""
    make = sft(tmp_path, [12] * 6, loss_type=loss_type)
    first, last = term_gradients(
        make,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=2,
        learning_rate=0.0,
    )
    whole = term_gradients(make, per_device_train_batch_size=2, max_steps=3, learning_rate=0.0)
    assert agree(first, (whole[0] + whole[1]) / 2)
    assert agree(last, whole[2])


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_an_unused_loss_of_the_model_does_not_silence_the_term(tmp_path: Path) -> None:
    """DistributedDataParallel gives outputs that nobody uses a gradient of zero."""
    found, ids = [], tokens()
    for strength, parallel in ((1.0, False), (1.0, True), (0.0, False)):
        model = tiny("mixtral")
        trainer = dpo(tmp_path)(model, [BalanceCallback(FixedPrice(strength))])
        network = DistributedDataParallel(model, find_unused_parameters=True) if parallel else model
        output = network(input_ids=ids, labels=ids, fused_lm_head=True)
        (-output.log_probs.mean()).backward()
        found.append(router_gradient(trainer.model).clone())
    plain, parallel, without = found
    assert agree(parallel - without, plain - without)


@every_trainer
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["keep", "recompute", "reentrant"])
def test_tokens_are_counted_as_often_as_trl_counts_them(
    tmp_path: Path, name: str, reentrant: bool | None
) -> None:
    """Once a step: without DPO's reference model, GRPO's generation and its old probabilities."""
    checkpointing = {"activation_checkpointing": reentrant is not None}
    if reentrant is not None:
        checkpointing["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    # Generations for two steps: then GRPO recomputes the old probabilities.
    ahead = {"steps_per_generation": 4} if name == "grpo" else {}
    make = MAKERS[name](tmp_path, max_steps=2, logging_steps=1, **checkpointing, **ahead)
    trainer = make(tiny("mixtral"), [BalanceCallback(mb.PhiBalancing())], split=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    theirs = max(entry.get("num_tokens", 0) for entry in logs)  # so far; GRPO says when it makes
    assert sum(entry["moe/tokens"] for entry in logs) == theirs > 0


@every_trainer
def test_the_models_own_loss_is_not_in_the_trainers(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL adds it by default: coefficient 0.001 in this model's configuration; here it is 10."""
    weights = []
    for callbacks, changes in (
        ([BalanceCallback(mb.NoBalancing())], {}),
        ([], {"router_aux_loss_coef": 0.0}),
        ([], {}),
    ):
        model = tiny("mixtral", router_aux_loss_coef=10.0)
        trainer = MAKERS[name](tmp_path, learning_rate=1e-2, **changes)(model, callbacks, split=2)
        trainer.train()
        weights.append(model.model.layers[0].mlp.gate.weight.detach().clone())
        if callbacks:
            # GRPO asks for the loss before any callback hears of it, and is handed a zero.
            assert log_of(trainer).get("aux_loss", 0.0) == 0.0
            assert ("aux_loss" in log_of(trainer)) == (name == "grpo")
            assert model.config.router_aux_loss_coef == 10.0
            assert not model.config.output_router_logits
    ours, without, with_own = weights
    assert torch.equal(ours, without)
    assert not torch.equal(ours, with_own)
    assert sum("router_aux_loss_coef=0.0" in r.message for r in caplog.records) == 1


@every_trainer
@pytest.mark.situation(
    "Loss",
    "A TRL trainer is told to add the model's own balancing loss",
    "refused: two balancing losses; set `router_aux_loss_coef=0.0`",
)
def test_a_native_loss_that_was_asked_for_is_refused(tmp_path: Path, name: str) -> None:
    make = MAKERS[name](tmp_path, router_aux_loss_coef=0.01)
    with pytest.raises(ValueError, match=r"set router_aux_loss_coef=0\.0"):
        make(tiny("mixtral"), [BalanceCallback(mb.PhiBalancing())])
    trainer = make(tiny("mixtral"), [])
    trainer.add_callback(BalanceCallback(mb.PhiBalancing()))
    with pytest.raises(ValueError, match=r"set router_aux_loss_coef=0\.0"):
        trainer.train()


@every_trainer
def test_a_callback_that_comes_late_silences_the_native_loss_too(tmp_path: Path, name: str) -> None:
    trainer = MAKERS[name](tmp_path)(tiny("mixtral", router_aux_loss_coef=10.0), [])
    assert trainer.aux_loss_enabled
    callback = BalanceCallback(mb.PhiBalancing())
    trainer.add_callback(callback)
    for _ in range(2):
        trainer.train()
        assert log_of(trainer)["aux_loss"] == 0.0
        assert log_of(trainer)["moe/tokens"] > 0
        callback.balancing.detach()  # and attached anew


def test_evaluation_is_free_of_the_native_loss(tmp_path: Path) -> None:
    losses = []
    for early, late, coefficient in ((1, 0, None), (0, 1, None), (0, 0, 0.0)):
        trainer = sft(tmp_path, [12] * 8, router_aux_loss_coef=coefficient, learning_rate=0.0)(
            tiny("mixtral", router_aux_loss_coef=10.0), [BalanceCallback(mb.PhiBalancing())] * early
        )
        if late:
            trainer.add_callback(BalanceCallback(mb.PhiBalancing()))
        trainer.train()
        found = trainer.evaluate(trainer.train_dataset)
        assert found.get("eval_aux_loss") == (0.0 if late else None)
        losses.append(found["eval_loss"])
    assert losses[0] == losses[1] == losses[2]


def test_an_interrupted_run_resumes_as_if_it_had_not_been(tmp_path: Path) -> None:
    def run(folder: Path, steps: int, resume: bool = False) -> tuple[Any, mb.Balancing]:
        model = tiny("mixtral")
        if resume:  # a Trainer that resumes does not load experts saved under other names
            model = type(model).from_pretrained(folder / "checkpoint-2").train()
        callback = BalanceCallback(mb.PhiBalancing(strength=0.1))
        trainer = sft(folder, [12] * 8, save_strategy="steps", save_steps=2, learning_rate=1e-2)(
            model, [callback], per_device_train_batch_size=2, max_steps=4
        )
        if steps < 4:

            class Stop(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    control.should_training_stop = state.global_step == steps

            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return model, callback.balancing

    model, whole = run(tmp_path / "whole", 4)
    run(tmp_path / "halves", 3)
    again, resumed = run(tmp_path / "halves", 4, resume=True)
    assert resumed.steps == whole.steps == 4
    for name, layer in whole.state_dict()["layers"].items():
        for key, tensor in layer.items():
            assert torch.equal(tensor, resumed.state_dict()["layers"][name][key]), (name, key)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
