"""Megatron-Core: checkpoints, half precision, whole GPT models, and the page about all of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_models import (
    HIDDEN,
    RELEASE,
    Float16Module,
    GPTModel,
    MicroBatch,
    alone,
    attach,
    balanced,
    balanced_spec,
    dist_checkpointing,
    finalize_model_grads,
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    make_config,
    make_tower,
    normal,
    run_schedule,
    run_step,
    wrap,
)
from torch import Tensor, nn

from moebalance import LossFree, PhiBalancing, QuantileBalancing, SwitchLoss, Together
from moebalance.integrations.megatron import BalancedTopKRouter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),
    # Its checkpoints call torch by older names.
    pytest.mark.filterwarnings("ignore:.load_state_dict. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecating ShardedTensor:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The argument order of load has been changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning"),
]

PHI = PhiBalancing(strength=0.1, rate=0.5)
BOTH = Together(PHI, LossFree(speed=0.02))
BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
}
PAGE = Path(__file__).parents[2] / "docs" / "megatron.md"
VOCABULARY, LENGTH = 32, 8


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    with alone():
        yield


def batch(seed: int = 0) -> MicroBatch:
    return MicroBatch(normal((8, 2, HIDDEN), seed))


def gpt(method: Any, **settings: Any) -> nn.Module:
    spec = get_gpt_layer_local_spec(num_experts=4)
    spec = spec if method is None else balanced_spec(spec, method)
    return GPTModel(make_config(**settings), spec, VOCABULARY, LENGTH)


def train_gpt(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """One step of language modelling; gradients of the routers."""
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(LENGTH).expand(2, LENGTH)

    def forward_step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        return chunk(ids, positions, None, labels=ids), lambda loss: (loss.mean(), {})

    return run_schedule(model, forward_step, micro_batches=2)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if ".balance." in name}


@pytest.mark.parametrize("method", [PHI, BOTH, QuantileBalancing(bins=64)], ids=repr)
def test_a_distributed_checkpoint_goes_on_as_if_never_interrupted(method, tmp_path):
    old = gpt(method)
    wrapped = wrap(old)
    attach(wrapped)
    for step in range(2):
        train_gpt(wrapped, step)
    dist_checkpointing.save(old.sharded_state_dict(), tmp_path)
    new = gpt(method)
    assert any(not torch.equal(v, state_of(new)[name]) for name, v in state_of(old).items())
    new.load_state_dict(dist_checkpointing.load(new.sharded_state_dict(), tmp_path))
    for name, value in state_of(old).items():
        assert torch.equal(state_of(new)[name], value)
    resumed = wrap(new)
    attach(resumed)
    expected = train_gpt(wrapped, 2)
    for name, gradient in train_gpt(resumed, 2).items():
        assert torch.equal(gradient, expected[name])


def test_a_checkpoint_of_megatrons_own_router_starts_a_new_memory_and_hands_over_its_bias(caplog):
    stock = make_tower(make_config(**BIAS))
    stock.layers[1].router.expert_bias.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    ours = make_tower(make_config(**BIAS), BOTH)
    ours.layers[0].router.balance.state[0].mean.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    with caplog.at_level("INFO", "moebalance"):
        ours.load_state_dict(stock.state_dict())
    assert "starts anew" in caplog.text
    assert ours.layers[1].router.balance.price.tolist() == pytest.approx([-0.1, 0.2, -0.3, 0.0])
    hidden = batch().hidden
    for found, expected in zip(ours.eval()(hidden), stock.eval()(hidden), strict=True):
        assert torch.equal(found, expected)


def test_megatron_reads_a_trained_price_as_its_own_bias():
    model, balancing = balanced(LossFree(speed=0.05), **BIAS)
    for step in range(4):
        run_step(model, [batch(step)])
    ours = model.module
    stock = make_tower(make_config(**BIAS))
    missing, unexpected = stock.load_state_dict(ours.state_dict(), strict=False)
    assert not missing
    assert all(".balance." in name for name in unexpected)
    assert all(layer.price.any() for layer in balancing.layers.values())
    hidden = batch().hidden
    assert torch.equal(stock.eval()(hidden), ours.eval()(hidden))
    balancing.detach(keep_price=True)


def test_a_distributed_checkpoint_without_our_state_loads_where_it_is_told_so(tmp_path):
    stock, ours = gpt(None), gpt(PHI)
    dist_checkpointing.save(stock.sharded_state_dict(), tmp_path)
    ours.load_state_dict(
        dist_checkpointing.load(ours.sharded_state_dict(), tmp_path, strict="log_all")
    )
    weights = ours.state_dict()
    for name, value in stock.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(weights[name], value)


@pytest.mark.skipif(RELEASE < (0, 19), reason="0.19 brought quantile balancing")
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside phi"])
def test_a_price_in_nats_goes_on_from_megatrons_quantile_balancing(beside):
    stock = quantile_balanced()
    method = QuantileBalancing(scale="nats")
    ours = make_tower(make_config(), Together(PHI, method) if beside else method)
    ours.load_state_dict(stock.state_dict())
    hidden = normal((64, 2, HIDDEN), seed=5)
    for old, new in zip(stock.eval().layers, ours.eval().layers, strict=True):
        for found, expected in zip(new.router(hidden), old.router(hidden), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.skipif(RELEASE < (0, 19), reason="0.19 brought quantile balancing")
@pytest.mark.parametrize(
    ("method", "score"),
    [(PHI, "softmax"), (QuantileBalancing(), "softmax"), (LossFree(scale="nats"), "sigmoid")],
    ids=["no price", "affinities", "sigmoid"],
)
def test_a_method_that_cannot_go_on_from_quantile_balancing_says_so(method, score):
    stock = quantile_balanced()
    ours = make_tower(make_config(moe_router_score_function=score), method)
    with pytest.raises(RuntimeError, match=r"layers\.0\.router\.qb_beta was trained by"):
        ours.load_state_dict(stock.state_dict(), strict=False)
    weights = {name: v for name, v in stock.state_dict().items() if "qb_beta" not in name}
    ours.load_state_dict(weights)


def quantile_balanced() -> Any:
    """A tower with Megatron's own quantile balancing, as if trained with it."""
    tower = make_tower(make_config(moe_router_load_balancing_type="quantile_balancing"))
    for number, layer in enumerate(tower.layers):
        layer.router.qb_beta.copy_(normal((4,), seed=number))
    return tower


def test_half_precision_leaves_state_and_sums_in_float32():
    config = make_config(bf16=True, params_dtype=torch.bfloat16, **BIAS)
    model = wrap(Float16Module(config, make_tower(config, BOTH)))
    balancing = attach(model)
    # Off centre, so that no expert's load is so even that rounding turns its price around.
    hidden = (normal((512, 2, HIDDEN), 0) + 1).bfloat16()
    for _ in range(2):
        found = run_step(model, [MicroBatch(hidden)])
    assert {gradient.dtype for gradient in found.values()} == {torch.bfloat16}
    assert {value.dtype for value in state_of(model).values()} == {torch.float32}
    for layer in balancing.layers.values():
        # 257 is the first whole number that bfloat16 has not.
        assert layer.last_sums.counts.sum() == 2048
        assert (layer.last_sums.counts.round() == layer.last_sums.counts).all()
        assert layer.price.any()
        moves = layer.price / 0.02  # which bfloat16 has only to three digits
        torch.testing.assert_close(moves, moves.round(), rtol=0, atol=1e-5)
    router = model.module.module.layers[0].router
    assert router.expert_bias.dtype == torch.float32
    assert torch.equal(router.expert_bias, -router.balance.price)


def test_the_snippet_of_the_page_trains_a_gpt_model():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 15
    names = {
        "config": make_config(finalize_model_grads_func=None),
        "use_transformer_engine": False,
        "vocabulary": VOCABULARY,
        "length": LENGTH,
    }
    exec(code, names)
    model, balancing = wrap(names["model"]), names["balancing"]
    names["config"].finalize_model_grads_func = finalize_model_grads
    for step in range(2):
        train_gpt(model, step)
    assert balancing.steps == 2
    assert balancing.metrics()["tokens"] == 2 * 2 * LENGTH
    assert list(balancing.layers) == [f"decoder.layers.{n}.mlp.router" for n in (0, 1)]


def test_a_term_changes_a_gpt_models_router_gradient_by_itself_alone():
    plain, other = (wrap(_seeded(method)) for method in (SwitchLoss(0.0), SwitchLoss(0.1)))
    for model in (plain, other):
        attach(model)
    expected, found = train_gpt(plain), train_gpt(other)
    assert all(not torch.equal(found[name], gradient) for name, gradient in expected.items())


def _seeded(method: Any) -> nn.Module:
    torch.manual_seed(0)
    return gpt(method)


@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
def test_a_spec_is_copied_and_every_moe_layer_of_it_is_found():
    spec = get_gpt_decoder_block_spec(
        make_config(moe_layer_freq=[0, 1]), use_transformer_engine=False
    )
    model = GPTModel(make_config(moe_layer_freq=[0, 1]), balanced_spec(spec, PHI), 8, 8)
    routers = [m for m in model.modules() if isinstance(m, BalancedTopKRouter)]
    assert len(routers) == 1
    again = GPTModel(make_config(moe_layer_freq=[0, 1]), spec, 8, 8)
    assert not any(isinstance(m, BalancedTopKRouter) for m in again.modules())


def test_specs_without_experts_or_with_another_router_are_refused():
    with pytest.raises(ValueError, match="num_experts"):
        balanced_spec(get_gpt_layer_local_spec(), PHI)
    spec = balanced_spec(get_gpt_layer_local_spec(num_experts=4), PHI)
    with pytest.raises(ValueError, match="already"):
        balanced_spec(spec, PHI)
    with pytest.raises(TypeError, match="PhiBalancing"):
        balanced_spec(get_gpt_layer_local_spec(num_experts=4), PhiBalancing)
