"""A trained selection price leaves with the weights, is refused, or is warned about; never lost."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

import moebalance as mb
from families import FAMILIES, loss, tiny, tokens
from moebalance.integrations.huggingface.exporting import rounding
from training import Rows, arguments, light_collections

NATIVE = ("deepseek_v3", "glm4_moe", "ernie4_5_moe", "minimax_m2")
PRICED = (
    mb.LossFree(speed=0.02),
    mb.QuantileBalancing(bins=100),
    mb.Together(mb.PhiBalancing(), mb.LossFree(speed=0.02)),
)
UNPRICED = (mb.PhiBalancing(), mb.Sinkhorn(), mb.NoBalancing())


def trained(
    family: str, method: mb.Method, *, steps: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, mb.Balancing]:
    """A model and its handle after some steps, in evaluation mode."""
    model = tiny(family).to(dtype)
    balancing = mb.attach(model, method)
    step(model, balancing, steps)
    return model, balancing


def step(model: torch.nn.Module, balancing: mb.Balancing, steps: int) -> None:
    ids = tokens()
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        balancing.step()
    model.eval()


@torch.no_grad()
def outputs(model: torch.nn.Module) -> Tensor:
    return model(input_ids=tokens()).logits


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.message for r in caplog.records if r.levelno == logging.WARNING]


# --- Families with a selection bias -------------------------------------------------------------


@pytest.mark.parametrize("method", PRICED, ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("family", NATIVE)
def test_a_trained_price_comes_back_from_an_export_bit_for_bit(
    tmp_path: Path, family: str, method: mb.Method
) -> None:
    model, balancing = trained(family, method)
    before = outputs(model)
    assert mb.huggingface.export(model, balancing, tmp_path) == tmp_path
    assert torch.equal(outputs(loaded(tmp_path)), before)
    assert torch.equal(outputs(model), before)  # detached, and routing on as trained
    assert any(bool(site.bias.any()) for site in mb.huggingface.find_sites(model))


def test_every_family_with_a_bias_exports_its_price(tmp_path: Path) -> None:
    exported = []
    for family in FAMILIES:
        model, ids = tiny(family), tokens()
        try:
            balancing = mb.attach(model, PRICED[0])
        except ValueError:  # no lever, or refused: see the table of families
            continue
        if balancing.price_outside:
            continue
        for _ in range(2):
            loss(model, ids).backward()
            balancing.step()
        with torch.no_grad():
            before = loss(model.eval(), ids)
            mb.huggingface.export(model, balancing, tmp_path / family)
            after = loss(type(model).from_pretrained(tmp_path / family).eval(), ids)
        assert torch.equal(after, before), family
        exported.append(family)
    assert len(exported) >= 33


@pytest.mark.parametrize("family", NATIVE)
def test_saving_while_attached_saves_the_price_too(tmp_path: Path, family: str) -> None:
    model, _ = trained(family, PRICED[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(loaded(tmp_path)), outputs(model))


def test_a_sharded_export_is_read_back_whole(tmp_path: Path) -> None:
    model, balancing = trained("deepseek_v3", PRICED[0])
    before = outputs(model)
    mb.huggingface.export(model, balancing, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(outputs(loaded(tmp_path)), before)


def test_an_export_leaves_the_native_loss_as_it_was_configured(tmp_path: Path) -> None:
    model = tiny("minimax_m2", output_router_logits=True)
    balancing = mb.attach(model, PRICED[0])
    step(model, balancing, 1)
    mb.huggingface.export(model, balancing, tmp_path)
    assert loaded(tmp_path).config.output_router_logits


def test_detaching_restores_the_bias_unless_the_price_is_kept() -> None:
    for keep in (False, True):
        model, balancing = trained("deepseek_v3", PRICED[0])
        prices = {name: layer.price for name, layer in balancing.layers.items()}
        balancing.detach(keep_price=keep)
        for site in mb.huggingface.find_sites(model):
            expected = -prices[site.name] if keep else torch.zeros(site.num_experts)
            assert torch.equal(site.bias, expected)


def test_a_file_without_the_price_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, balancing = trained("deepseek_v3", PRICED[0])
    whole = model.save_pretrained

    def lossy(folder: Path) -> None:
        state = {k: v for k, v in model.state_dict().items() if "correction" not in k}
        whole(folder, state_dict=state)

    monkeypatch.setattr(model, "save_pretrained", lossy)
    with pytest.raises(RuntimeError, match=r"without the trained selection bias of model\."):
        mb.huggingface.export(model, balancing, tmp_path)


# --- Families without ---------------------------------------------------------------------------


IN_NATS = (
    mb.recommended(),
    mb.LossFree(scale="nats"),
    mb.QuantileBalancing(scale="nats", bins=100),
    mb.SMEBU(scale="nats"),
)


@pytest.mark.parametrize("method", PRICED, ids=lambda b: type(b).__name__)
def test_an_export_without_a_place_for_the_price_is_refused_and_nothing_is_done(
    tmp_path: Path, method: mb.Method
) -> None:
    model, balancing = trained("olmoe", method)
    before = outputs(model)
    with pytest.raises(ValueError, match=r"weights of model\.layers\.0\.mlp\.gate and 1 more do"):
        mb.huggingface.export(model, balancing, tmp_path / "out")
    with pytest.raises(ValueError, match="do not hold it"):
        balancing.detach(keep_price=True)
    assert not (tmp_path / "out").exists()
    assert torch.equal(outputs(model), before)
    step(model, balancing, 1)  # attached still


@pytest.mark.parametrize("family", ["olmoe", "minimax_m2"])
@pytest.mark.parametrize("method", IN_NATS, ids=str)
def test_a_price_in_nats_is_in_no_weights_and_never_left_behind_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, method: mb.Method
) -> None:
    model, balancing = trained(family, method)
    with pytest.raises(ValueError, match="do not hold it"):
        mb.huggingface.export(model, balancing, tmp_path / "out")
    with pytest.raises(ValueError, match="do not hold it"):
        balancing.detach(keep_price=True)
    with caplog.at_level(logging.WARNING, "moebalance"):
        model.save_pretrained(tmp_path)
    (message,) = warnings_of(caplog)
    assert "a price in affinities, and a selection bias of the model's own" in message
    balancing.detach()  # without it a user may go on


@pytest.mark.parametrize("method", UNPRICED, ids=lambda b: type(b).__name__)
def test_methods_without_a_price_export_anywhere(tmp_path: Path, method: mb.Method) -> None:
    model, balancing = trained("olmoe", method)
    before = outputs(model)
    mb.huggingface.export(model, balancing, tmp_path)
    assert torch.equal(outputs(loaded(tmp_path)), before)


def test_a_price_that_moves_no_choice_may_be_left_behind(tmp_path: Path) -> None:
    model = tiny("olmoe")
    mb.huggingface.check_export(
        model, mb.attach(model, mb.LossFree())
    )  # no step yet: every price is 0


@pytest.mark.parametrize("method", [mb.PhiBalancing(), PRICED[0]], ids=str)
def test_a_model_of_which_a_part_is_balanced_is_exported(tmp_path: Path, method: mb.Method) -> None:
    model = tiny("deepseek_v3")
    balancing = mb.attach(model, method, layers="*layers.1.*")
    assert len(balancing.layers) < len(mb.huggingface.find_sites(model))
    step(model, balancing, 3)
    before = outputs(model)
    mb.huggingface.export(model, balancing, tmp_path)
    assert torch.equal(outputs(loaded(tmp_path)), before)


def test_a_handle_of_another_model_is_refused() -> None:
    _, balancing = trained("olmoe", mb.PhiBalancing(), steps=0)
    with pytest.raises(ValueError, match=r"This handle balances model\.layers\.0\.mlp\.gate"):
        mb.huggingface.check_export(tiny("jamba"), balancing)


# --- Saving by hands that are not ours ----------------------------------------------------------


def test_saving_weights_that_lack_their_price_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("olmoe")
    balancing = mb.attach(model, mb.LossFree(speed=0.02))
    with caplog.at_level(logging.WARNING, "moebalance"):
        model.save_pretrained(tmp_path)
        assert warnings_of(caplog) == []  # nothing trained yet
        step(model, balancing, 1)
        model.save_pretrained(tmp_path)
        model.state_dict()
    (message,) = warnings_of(caplog)
    assert "trained a selection price" in message
    assert "send tokens to other experts than in training" in message


@pytest.mark.parametrize(
    ("family", "method"), [("olmoe", mb.PhiBalancing()), ("deepseek_v3", PRICED[0])]
)
def test_saving_weights_that_lack_nothing_is_not_warned_about(
    caplog: pytest.LogCaptureFixture, family: str, method: mb.Method
) -> None:
    model, balancing = trained(family, method)
    with caplog.at_level(logging.WARNING, "moebalance"):
        model.state_dict()
        balancing.detach()
        model.state_dict()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(("family", "told"), [("deepseek_v3", 0), ("olmoe", 1)])
def test_a_trainer_saves_the_price_or_its_log_says_that_it_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, told: int
) -> None:
    model = tiny(family)
    callback = mb.huggingface.BalanceCallback(mb.LossFree(speed=0.02))
    with light_collections(), caplog.at_level(logging.WARNING, "moebalance"):
        trainer = Trainer(
            model, arguments(tmp_path, max_steps=2), train_dataset=Rows(8), callbacks=[callback]
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
    assert len(warnings_of(caplog)) == told
    model.eval()
    assert torch.equal(outputs(loaded(tmp_path / "final")), outputs(model)) == (not told)


# --- Low precision ------------------------------------------------------------------------------


def test_rounding_is_that_of_the_dtype() -> None:
    bias = torch.tensor([0.8, -0.3001, 0.0])
    found = rounding(bias, torch.bfloat16)
    assert found.step == 2.0**-8  # 8 bits for 0.5 … 1
    assert found.error == pytest.approx((bias.bfloat16().double() - bias.double()).abs().max())
    assert rounding(bias, torch.float16).step == 2.0**-11
    assert rounding(torch.zeros(3), torch.bfloat16) == (0.0, 0.0)


def test_a_bias_in_low_precision_is_warned_about_in_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, balancing = trained("minimax_m2", mb.LossFree(speed=0.3), steps=1, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING, "moebalance"):
        model.state_dict()
        mb.huggingface.export(model, balancing, tmp_path)
    (message,) = warnings_of(caplog)
    # Prices of ±0.3: bfloat16 has steps of 2⁻⁹ there, and makes 0.30078 of it.
    assert "is bfloat16. Its price is rounded to steps of 0.002, 2 times" in message
    assert "the largest error is 0.00078" in message


def test_one_tensor_in_float32_exports_exactly_from_a_bfloat16_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny("minimax_m2").bfloat16()
    for site in mb.huggingface.find_sites(model):
        site.bias.data = site.bias.data.float()
    balancing = mb.attach(model, mb.LossFree(speed=0.3))
    step(model, balancing, 1)
    prices = [layer.price for layer in balancing.layers.values()]
    with caplog.at_level(logging.WARNING, "moebalance"):
        mb.huggingface.export(model, balancing, tmp_path)
    assert warnings_of(caplog) == []
    stored = load_file(tmp_path / "model.safetensors")
    biases = [tensor for key, tensor in sorted(stored.items()) if "correction" in key]
    assert [torch.equal(-price, bias) for price, bias in zip(prices, biases, strict=True)] == [
        True,
        True,
    ]
