"""torchtitan: the recipe and its command line, checkpoints, exports, metrics and refusals."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchtitan_models import (
    BATCH,
    EXPERTS,
    LAST,
    LENGTH,
    ConfigManager,
    MoE,
    ParallelDims,
    TokenChoiceTopKRouter,
    adam,
    llama3,
    one_process,
    quiet,
    qwen3,
    state,
    tiny_config,
    train,
    trainer,
)

from moebalance import LossFree, Method, PhiBalancing, Together
from moebalance.integrations.torchtitan import BalancedTopKRouter, balanced, drive
from moebalance.integrations.torchtitan.release import check_release

BOTH = Together(PhiBalancing(strength=1.0), LossFree())
ALONE = ParallelDims(1, 1, 1, 1, 1, 1, 1)
GUIDE = Path(__file__).parents[2] / "docs" / "torchtitan.md"


@pytest.fixture(autouse=True, scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_process(tmp_path_factory.mktemp("group")):
        yield


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def make_model(config: Any) -> Any:
    """The model of a configuration, with weights."""
    torch.manual_seed(0)
    model = config.model_spec.model.build()
    with torch.no_grad():
        model.init_weights()
    return model.train()


def biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key.endswith("expert_bias_E")}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The guide's recipe as a user's package."""
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    folder = tmp_path / "my_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "config_registry.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_package"
    for name in [n for n in sys.modules if n.split(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["phi", "phi_and_loss_free"])
def test_the_guides_recipe_is_found_by_module_and_config(package: str, name: str) -> None:
    arguments = ["--module", package, "--config", name, "--training.steps", "3"]
    config = ConfigManager().parse_args(
        [*arguments, "--metrics.log_freq", "7", "--parallelism.expert_parallel_degree", "1"]
    )
    assert (config.training.steps, config.metrics.log_freq) == (3, 7)
    assert type(config.metrics).__qualname__ == "BalanceMetrics.Config"
    found = [layer.router for _, layer, _, _ in config.model_spec.traverse(MoE.Config)]
    assert len(found) == 5
    assert {type(router) for router in found} == {BalancedTopKRouter.Config}
    assert "PhiBalancing(" in str(config.to_dict())


def test_metrics_reach_torchtitans_log(monkeypatch: pytest.MonkeyPatch) -> None:
    config = balanced(tiny_config(), BOTH)
    config.metrics.log_freq = 1
    logged: list[dict[str, Any]] = []
    with trainer(config) as built:
        sink = built.metrics_processor.logger
        monkeypatch.setattr(sink, "log", lambda metrics, step: logged.append(metrics))
        built.train()
    assert len(logged) == 2
    assert logged[1]["moe/maxvio"] > 0
    assert logged[1]["moe/tokens"] == BATCH * LENGTH
    assert "loss_metrics/global_avg_loss" in logged[1]


def test_a_hook_of_the_users_own_still_runs_and_the_stock_rule_never() -> None:
    config = tiny_config()
    stock = config.model_spec.post_optimizer_build_fn
    called = []

    def own(*args: Any) -> None:
        called.append(len(args))
        stock(*args)

    config.model_spec.post_optimizer_build_fn = own
    found = state(train(balanced(config, PhiBalancing())))
    assert called == [3]
    assert not torch.stack(list(biases(found).values())).any()


def test_the_bias_is_saved_as_it_is(tmp_path: Path) -> None:
    """torchtitan #1222: biases were saved as the zeros they were made of."""
    built = train(balanced(tiny_config(tmp_path), BOTH))
    trained = state(built)
    saved = {key: torch.full_like(tensor, torch.nan) for key, tensor in trained.items()}
    dcp.load(saved, checkpoint_id=tmp_path / "checkpoint" / "step-2")
    for key, tensor in trained.items():
        assert torch.equal(saved[key], tensor), key
    price = saved[f"{LAST}.balance.state_1_price"]
    assert price.abs().max() > 1e-3
    assert torch.equal(saved["layers.2.moe.expert_bias_E"], -price)
    assert saved[f"{LAST}.balance.state_0_weight"] > 0


@pytest.mark.filterwarnings("ignore:To get the last learning rate")  # torchtitan's schedulers
def test_resumes_to_the_bit(tmp_path: Path) -> None:
    def config(steps: int) -> Any:
        found = balanced(tiny_config(tmp_path, steps=steps), BOTH)
        found.lr_scheduler.warmup_steps = 0
        found.lr_scheduler.decay_ratio = 0.0
        return found

    train(config(2))
    resumed = state(train(config(4)))
    whole = config(4)
    whole.checkpoint.enable = False
    straight = state(train(whole))
    assert straight[f"{LAST}.balance.last_step"].tolist() == [BATCH * LENGTH, 1]
    for key, tensor in straight.items():
        assert torch.equal(resumed[key], tensor), key


def test_goes_on_from_a_bias_that_other_software_trained() -> None:
    model = make_model(balanced(tiny_config(), LossFree()))
    optimizers = adam(1e-2).build(model_parts=[model])
    drive(optimizers, [model], ALONE, method=LossFree())
    theirs = torch.randn(EXPERTS)
    model.load_state_dict({"layers.2.moe.expert_bias_E": theirs}, strict=False)
    balance = model.get_submodule(LAST).balance
    assert torch.equal(balance.price, -theirs)
    assert not model.get_submodule("layers.1.moe.router").balance.price.any()


def test_exports_to_hugging_face_hold_the_price_and_no_state_of_ours() -> None:
    def exported(method: Method | None) -> dict[str, Tensor]:
        config = tiny_config() if method is None else balanced(tiny_config(), method)
        spec = config.model_spec
        model = make_model(config)
        for bias in biases(model.state_dict()).values():
            bias.copy_(torch.arange(EXPERTS))
        return spec.state_dict_adapter(spec.model, None).to_hf(model.state_dict())

    ours, stock = exported(BOTH), exported(None)
    assert set(ours) == set(stock)
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert torch.equal(ours[name], torch.arange(EXPERTS).float())


def test_warns_where_an_export_would_lose_the_price(caplog: pytest.LogCaptureFixture) -> None:
    def warnings_under(method: Method) -> list[str]:
        caplog.clear()
        config = balanced(
            dataclasses.replace(tiny_config(), model_spec=qwen3("debugmodel_moe")), method
        )
        spec = config.model_spec
        with caplog.at_level(logging.WARNING, logger="moebalance"):
            spec.state_dict_adapter(spec.model, None)
        return [r.message for r in caplog.records if r.name == "moebalance"]

    assert warnings_under(PhiBalancing()) == []
    for method in (LossFree(), LossFree(scale="nats")):
        (message,) = warnings_under(method)
        assert "Qwen3StateDictAdapter has no name for it" in message


def test_refuses_a_model_without_moe_layers() -> None:
    config = dataclasses.replace(tiny_config(), model_spec=llama3("debugmodel"))
    with pytest.raises(ValueError, match="no MoE layer to balance"):
        balanced(config, PhiBalancing())


def test_refuses_to_balance_twice() -> None:
    with pytest.raises(ValueError, match="balanced by PhiBalancing"):
        balanced(balanced(tiny_config(), PhiBalancing()), LossFree())


def test_refuses_what_is_no_method() -> None:
    with pytest.raises(TypeError, match="must be a Method"):
        balanced(tiny_config(), "phi")  # type: ignore[arg-type]


def test_refuses_a_router_of_another_class() -> None:
    class Other(TokenChoiceTopKRouter):  # type: ignore[misc]
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(TokenChoiceTopKRouter.Config):  # type: ignore[misc]
            pass

    config = tiny_config()
    layer = config.model_spec.model.layers[2].moe
    layer.router = Other.Config(num_experts=EXPERTS, gate=layer.router.gate)
    with pytest.raises(TypeError, match=r"layers\.2\.moe has a router of its own, .*Other"):
        balanced(config, PhiBalancing())


def test_refuses_a_quantile_balanced_router_by_name_and_names_the_method() -> None:
    class QuantileBalancedTopKRouter(TokenChoiceTopKRouter):  # type: ignore[misc]
        """As torchtitan's main branch has it, for all that its configuration shows."""

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(TokenChoiceTopKRouter.Config):  # type: ignore[misc]
            num_bins: int = 500

    config = tiny_config()
    layer = config.model_spec.model.layers[2].moe
    layer.router = QuantileBalancedTopKRouter.Config(num_experts=EXPERTS, gate=layer.router.gate)
    with pytest.raises(TypeError, match=r"QuantileBalancedTopKRouter.*Balancing\(bins=500\)"):
        balanced(config, PhiBalancing())


def test_refuses_a_torchtitan_whose_routers_take_tokens_without_sequences() -> None:
    class Main(TokenChoiceTopKRouter):  # type: ignore[misc]
        def forward(self, x_TD: Tensor, expert_bias_E: Tensor | None = None) -> None: ...

    check_release()
    with pytest.raises(ImportError, match=r"takes \(self, x_TD, expert_bias_E\).*==0\.3\.0"):
        check_release(Main)


def test_refuses_to_balance_a_choice_that_is_forced() -> None:
    config = balanced(tiny_config(), PhiBalancing())
    config.debug.moe_force_load_balance = True
    with pytest.raises(ValueError, match="nothing to balance"), trainer(config):
        pass


def test_refuses_a_frozen_router_only_under_a_method_that_needs_its_gradient() -> None:
    def driven(method: Method) -> Any:
        model = make_model(balanced(tiny_config(), method))
        optimizers = adam(1e-2).build(model_parts=[model])
        model.get_submodule(LAST).gate.requires_grad_(False)
        return drive(optimizers, [model], ALONE, method=method)

    assert driven(LossFree()).layers.keys() == {"layers.1.moe.router", LAST}
    with pytest.raises(ValueError, match=r"layers\.2\.moe\.router is frozen"):
        driven(PhiBalancing())


def test_refuses_a_model_whose_routers_were_replaced_afterwards() -> None:
    config = balanced(tiny_config(), PhiBalancing())
    config.model_spec.model = tiny_config().model_spec.model
    with pytest.raises(RuntimeError, match="Call balanced\\(\\) last"), trainer(config):
        pass
