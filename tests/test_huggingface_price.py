"""The price in a model's own bias stays with the weights that it belongs to."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import moebalance as mb
from families import tiny, tokens
from processes import Failure, outcomes, run

pytestmark = pytest.mark.filterwarnings(  # PEFT's own
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)

SPEED = 0.001
TRAINED = torch.linspace(-0.4, 0.4, 8)


def biases(model: nn.Module) -> list[Tensor]:
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def step(model: nn.Module, balancing: mb.core.handle.Balancing, seed: int = 0) -> None:
    ids = tokens(2, 12, seed=seed)
    model(input_ids=ids, labels=ids).loss.backward()
    balancing.step()


@pytest.mark.parametrize("after_steps", [0, 2])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.situation(
    "Price",
    "Weights with a selection bias are loaded after `attach`",
    "works: the price goes on from the loaded bias",
)
def test_a_bias_that_is_loaded_after_attaching_is_kept(after_steps: int, assign: bool) -> None:
    model, other = tiny("deepseek_v3"), tiny("deepseek_v3")
    for bias in biases(other):
        bias.copy_(TRAINED)
    balancing = mb.attach(model, mb.LossFree(speed=SPEED))
    for seed in range(after_steps):
        step(model, balancing, seed)
    model.load_state_dict(other.state_dict(), assign=assign)
    step(model, balancing)
    for bias in biases(model):
        assert (bias - TRAINED).abs().max() <= 2 * SPEED
    balancing.detach()
    assert all(torch.equal(bias, TRAINED) for bias in biases(model))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"], ids=["hook", "bias"])
@pytest.mark.situation(
    "Price",
    "A reference policy made by switching adapters off",
    "works: it does not feel the price",
)
def test_a_reference_made_by_switching_adapters_off_does_not_feel_the_price(family: str) -> None:
    ids = tokens(2, 12)
    bare = tiny(family).eval()
    reference = bare(input_ids=ids).logits
    model = get_peft_model(
        bare,
        LoraConfig(r=2, target_modules=["q_proj", "q_a_proj"], init_lora_weights=False),
    )
    balancing = mb.attach(model.train(), mb.LossFree(speed=0.5))
    step(model, balancing)
    model.eval()
    with torch.no_grad():
        with model.disable_adapter():
            found = model(input_ids=ids).logits
        policy = model(input_ids=ids).logits
    assert torch.equal(found, reference)
    with balancing:
        pass  # detached: the policy alone has felt the price
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, policy)


def test_a_reference_forward_that_an_exception_ends_leaves_the_price_in_force() -> None:
    ids = tokens(2, 12)
    model = get_peft_model(tiny("mixtral"), LoraConfig(r=2, target_modules=["q_proj"])).train()
    balancing = mb.attach(model, mb.LossFree(speed=0.5))
    step(model, balancing)
    model.eval()
    with torch.no_grad():
        policy = model(input_ids=ids).logits
        head = model.get_submodule("base_model.model.lm_head")
        stop = head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), model.disable_adapter():
            model(input_ids=ids)
        stop.remove()
        assert torch.equal(model(input_ids=ids).logits, policy)


def zeroed_on_the_second_rank(brought: bool) -> list[list[float]]:
    """As `cpu_ram_efficient_loading` has it: rank 0 holds the weights when `attach` is called."""
    rank = torch.distributed.get_rank()
    model = tiny("deepseek_v3")
    for bias in biases(model):
        bias.copy_(TRAINED if rank == 0 else torch.zeros(8))
    balancing = mb.attach(model, mb.LossFree(speed=SPEED))
    if brought:
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    for seed in range(2):
        step(model, balancing, 10 + 2 * seed + rank)
    return [bias.tolist() for bias in biases(model)]


@pytest.mark.situation(
    "Price",
    "FSDP with `cpu_ram_efficient_loading`: rank 0 sends its weights after `attach`",
    "works: equal prices on all ranks",
)
def test_weights_that_come_from_rank_0_after_attaching_bring_its_price() -> None:
    first, second = run(zeroed_on_the_second_rank, 2, True)
    assert first == second
    assert (torch.tensor(first) - TRAINED).abs().max() <= 3 * SPEED


@pytest.mark.situation(
    "Price",
    "Ranks that start from other selection biases",
    "refused: the first step names the router and both prices",
)
def test_ranks_that_start_from_other_prices_are_refused() -> None:
    for answer in outcomes(zeroed_on_the_second_rank, 2, False):
        assert isinstance(answer, Failure)
        assert "selection price of" in answer
