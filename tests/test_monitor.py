"""Monitoring without balancing: right where counting top-1, or ignoring the bias, is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import moebalance as mb
from families import tiny, tokens
from family_checks import hooks
from moebalance.report import summarise
from moebalance.runlog import read_run
from named_models import WIDTH, Layer, Model


def own() -> nn.Module:
    return nn.Sequential(mb.BalancedRouter(mb.PhiBalancing(), 4, 2))


def collapsed(model: nn.Module) -> nn.Module:
    """Let every router send all tokens to experts 0 and 1, whichever of the two comes first."""
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            with torch.no_grad():
                module.weight[2:] = 0
                module.weight[:2] *= 1e-3
                module.e_score_correction_bias[:2] = 5.0
    return model


def test_a_model_collapsed_onto_two_experts_by_its_bias_is_seen_as_collapsed() -> None:
    model, ids = collapsed(tiny("glm4_moe")).eval(), tokens()
    with mb.monitor(model) as watch, torch.no_grad():
        model(input_ids=ids)
        found = watch.evaluate()
    # Two of eight experts take all: each four times its share.
    assert found["maxvio"] == pytest.approx(3.0)
    assert found["dead"] == pytest.approx(0.75)


def test_all_k_experts_of_a_token_are_counted() -> None:
    model, ids = tiny("mixtral").eval(), tokens()
    with mb.monitor(model) as watch, torch.no_grad():
        model(input_ids=ids)
        layer = next(iter(watch.balancing.layers.values()))
        assert layer.watched.counts.sum().item() == 2 * ids.numel()
        assert watch.evaluate()["tokens"] == ids.numel()


def test_training_and_evaluation_are_counted_apart_and_padding_in_neither() -> None:
    model, ids = tiny("mixtral"), tokens()
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    with mb.monitor(model) as watch:
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        model.eval()
        for _ in range(2):
            model(input_ids=ids, attention_mask=mask)
        model.train()
        assert watch.step()["tokens"] == mask.sum().item()
        assert watch.evaluate()["tokens"] == 2 * mask.sum().item()
        assert watch.evaluate() == {}


def test_a_frozen_model_under_training_is_still_counted() -> None:
    model, ids = tiny("mixtral"), tokens()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with mb.monitor(model) as watch:
        model(input_ids=ids, labels=ids).loss.backward()
        assert watch.step()["tokens"] == ids.numel()


def test_checkpointing_does_not_count_a_router_below_everything_trained_twice() -> None:
    model, ids = tiny("mixtral"), tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    model.activation_checkpointing_enable({"use_reentrant": False})
    with mb.monitor(model) as watch:
        first = next(iter(watch.balancing.layers.values()))
        model(input_ids=ids, labels=ids).loss.backward()
        assert first.running[2 * first.num_experts] == ids.numel()
        assert watch.step()["tokens"] == ids.numel()


def test_a_monitor_leaves_the_models_own_balancing_loss_on() -> None:
    model, ids = tiny("mixtral", output_router_logits=True), tokens()
    with mb.monitor(model) as watch:
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        assert output.aux_loss is not None
        assert watch.step()["tokens"] == ids.numel()


def test_the_model_computes_the_same_with_a_monitor_as_without() -> None:
    ids, gradients = tokens(), []
    for watched in (True, False):
        model = tiny("qwen3_moe")
        if watched:
            mb.monitor(model)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_a_log_holds_a_dozen_scalars_a_step_and_snapshots_of_every_layer(tmp_path: Path) -> None:
    model, ids = tiny("mixtral"), tokens()
    with mb.monitor(model, tmp_path, name="mine", snapshot_every=2) as watch:
        for _ in range(4):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            watch.step(loss=loss.item())
        model.eval()
        model(input_ids=ids)
        watch.evaluate()
    run = read_run(tmp_path)
    assert (run.header["name"], run.method, run.status) == ("mine", "monitor", "complete")
    assert len(run.steps) == 4
    assert all(len(row) <= 14 and row["loss"] > 0 for row in run.steps)
    assert [row["step"] for row in run.snapshots] == [2, 4]
    (evaluation,) = run.evals
    counted = torch.tensor(evaluation["load"])
    assert evaluation["dead_experts"] == (counted * 8 < 0.01).sum()
    for row in (*run.snapshots, evaluation):
        for kind in ("load", "soft"):
            assert [len(layer) for layer in row[kind]] == [8, 8]
            assert [sum(layer) for layer in row[kind]] == pytest.approx([1, 1], abs=1e-5)


def test_a_balanced_model_is_logged_under_its_method_and_stays_balanced(tmp_path: Path) -> None:
    model, ids = tiny("mixtral"), tokens()
    method = mb.Together(mb.PhiBalancing(strength=0.02), mb.LossFree())
    balancing = mb.attach(model, method)
    with mb.monitor(balancing, tmp_path, name="mine", snapshot_every=1) as watch:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            watch.step(loss=1.0)
        model.eval()
        model(input_ids=ids)
        assert watch.evaluate(loss=1.0)["tokens"] == ids.numel()
    assert balancing.steps == 2
    assert hooks(model)
    run = read_run(tmp_path)
    assert (run.method, run.status, len(run.snapshots)) == ("phi+loss-free", "complete", 2)
    assert [part["kind"] for part in run.header["parts"]] == ["PhiBalancing", "LossFree"]
    assert run.steps[0]["price_spread"] >= 0
    (section,) = summarise([run])
    assert section.methods[0].label == "φ + loss-free"


def test_a_log_of_a_run_that_fails_says_so(tmp_path: Path) -> None:
    model, ids = tiny("mixtral"), tokens()

    def run() -> None:
        with mb.monitor(model, tmp_path) as watch:
            model(input_ids=ids, labels=ids).loss.backward()
            watch.step()
            raise KeyError("data")

    with pytest.raises(KeyError):
        run()
    assert read_run(tmp_path).status == "failed"


def test_a_trainer_drives_a_monitor(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    model = tiny("mixtral")
    with mb.monitor(model, tmp_path / "run") as watch:
        trainer = Trainer(
            model,
            TrainingArguments(
                str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=2,
                logging_steps=2,
                eval_strategy="steps",
                eval_steps=4,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                save_strategy="no",
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            eval_dataset=rows,
            callbacks=[mb.huggingface.MonitorCallback(watch)],
        )
        trainer.train()
    run = read_run(tmp_path / "run")
    assert [row["step"] for row in run.steps] == [1, 2, 3, 4]
    assert [row["step"] for row in run.steps if "loss" in row] == [2, 4]
    assert run.evals[0]["tokens"] == 8 * 12
    assert run.evals[0]["loss"] > 0


@pytest.mark.parametrize("every", [0, -5])
def test_snapshots_every_zero_steps_are_refused_before_anything_is_attached(every: int) -> None:
    model = tiny("mixtral")
    with pytest.raises(ValueError, match=f"snapshot_every={every}: give the steps between"):
        mb.monitor(model, snapshot_every=every)
    assert hooks(model) == 0


@pytest.mark.parametrize("place", ["", "mine.jsonl"])
def test_a_log_that_holds_a_run_is_refused_before_anything_is_attached(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "notes.txt").write_text("other files are none of its business")
    mb.monitor(tiny("mixtral"), tmp_path / place).close()
    before = [(path, path.read_bytes()) for path in sorted(tmp_path.iterdir())]
    model = tiny("mixtral")
    with pytest.raises(ValueError, match=r"jsonl holds a run already.*give another folder"):
        mb.monitor(model, tmp_path / place)
    assert hooks(model) == 0
    assert [(path, path.read_bytes()) for path in sorted(tmp_path.iterdir())] == before


def test_ranks_that_do_not_divide_the_experts_are_refused() -> None:
    model, ids = tiny("mixtral").eval(), tokens()
    with mb.monitor(model) as watch:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        watch.balancing.step()
        for ranks in (0, 3, 16):
            with pytest.raises(ValueError, match=rf"8 experts on {ranks} ranks.*\[1, 2, 4, 8\]"):
                watch.balancing.metrics(ep_size=ranks)
        assert watch.balancing.metrics(ep_size=4)["rankvio"] >= 0


def test_evaluation_without_watching_is_refused() -> None:
    with pytest.raises(RuntimeError, match="watch"):
        mb.attach(tiny("mixtral"), mb.NoBalancing()).evaluation()


def test_a_plain_pytorch_model_is_monitored_under_its_own_method() -> None:
    router: Any = mb.BalancedRouter(mb.PhiBalancing(strength=0.5), num_experts=8, top_k=2)
    with mb.monitor(router) as watch:
        router(torch.randn(10, 8, requires_grad=True))[0].sum().backward()
        assert watch.step()["tokens"] == 10
        router.eval()
        router(torch.randn(6, 8))
        assert watch.evaluate()["tokens"] == 6


def test_a_model_with_plain_gates_is_watched_by_their_names_and_not_balanced() -> None:
    model = Model(Layer())
    x = torch.randn(4, 16, WIDTH)
    alone = torch.autograd.grad(model(x).square().mean(), model.layers[0].gate.weight)[0]
    with mb.monitor(model, routers="*.gate", top_k=2) as watch:
        model(x).square().mean().backward()
        assert watch.step()["tokens"] == 64
    assert torch.equal(model.layers[0].gate.weight.grad, alone)


def test_a_layer_that_counts_its_own_choice_is_watched() -> None:
    balance = mb.CountAndCharge(mb.NoBalancing(), num_experts=4)
    with mb.monitor(nn.Sequential(balance)) as watch:
        logits = torch.randn(6, 4, requires_grad=True)
        balance(logits, logits.topk(2).indices).sum().backward()
        assert watch.step()["tokens"] == 6


@pytest.mark.parametrize("make", [lambda: tiny("mixtral"), lambda: Model(Layer()), own])
def test_a_balanced_model_is_watched_by_its_handle_as_the_refusal_says(make: Any) -> None:
    model = make()
    named = {"routers": "*.gate", "top_k": 2} if isinstance(model, Model) else {}
    method = None if isinstance(model, nn.Sequential) else mb.PhiBalancing()
    balancing = mb.attach(model, method, **named)
    with pytest.raises(ValueError, match=r"give it to monitor\(\) to watch it"):
        mb.monitor(model, **named)
    with mb.monitor(balancing) as watch:
        assert watch.balancing is balancing
