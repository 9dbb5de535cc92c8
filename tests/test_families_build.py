"""The tiny models themselves: every MoE family of Transformers is there, whole, and trains."""

import functools
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import COMMON, EXPECTED, FAMILIES, loss, tiny, tokens

MODELS = Path(transformers.__file__).parent / "models"

# Classes with the name of a router that no tiny model routes with, and why.
WITHOUT = {
    "BailingHybridForgetGate": "decay of linear attention",
    "DFineGate": "mixes two streams of a detector",
    "Deimv2Gate": "mixes two streams of a detector",
    "Dots3NoteVisionTopKRouter": "in a vision tower, which is not balanced",
    "Glm5NextTextForgetGate": "decay of linear attention",
    "GraniteDoclingDensityRouter": "picks a resolution",
    "KimiLinearForgetGate": "decay of linear attention",
    "MuseSparkResidualGate": "mixes two streams of a residual connection",
    "Qwen3OmniMoeTextTopKRouter": "built by no class",
}
# The same from Transformers 5.24 on.
WITHOUT_NEWER = {"Inkling2LoopMessageGate": "mixes the passes of a loop"}
EXPLAINED = WITHOUT | WITHOUT_NEWER
# The one family whose router is a bare Linear in its block.
BARE = ".router_gate"

# Families that do not keep a layer's experts in a module of that name.
WITHOUT_CONTAINER = {"doge", "jetmoe"}

# Where a configuration states the experts of each token; two families fix their number in code.
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
FIXED = {"nllb-moe", "switch_transformers"}

each_family = pytest.mark.parametrize("family", FAMILIES)


def named_like_a_router(name: str) -> bool:
    return re.search(r"(Router|Gate|Gating)$", name) is not None


def routers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith(BARE)
        or (named_like_a_router(type(module).__name__) and type(module).__name__ not in EXPLAINED)
    }


def tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [item for item in output if isinstance(item, Tensor)]


@functools.cache
def sources() -> dict[str, str]:
    """Text of all modeling files, by the name of their package."""
    texts: dict[str, str] = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        texts[path.parent.name] = texts.get(path.parent.name, "") + path.read_text("utf-8")
    return texts


def package(family: str) -> str:
    return CONFIG_MAPPING[family].__module__.split(".")[-2]


@each_family
def test_a_family_learns_in_every_router_that_its_text_reaches(family: str) -> None:
    model, expected = tiny(family), EXPECTED[family]
    found = routers(model)
    assert len(found) == expected.routers
    if family not in WITHOUT_CONTAINER:
        containers = [name for name, _ in model.named_modules() if name.endswith(".experts")]
        assert len(containers) == expected.routers
    outputs: dict[str, list[Tensor]] = {}
    for name, router in found.items():
        router.register_forward_hook(
            lambda _, __, output, name=name: outputs.__setitem__(name, tensors(output))
        )
    value = loss(model, tokens())
    assert value.isfinite()
    value.backward()
    assert len(outputs) == expected.routers - expected.idle
    for name, seen in outputs.items():
        columns = expected.num_experts + expected.empty
        if name.endswith(BARE):
            # Product keys: an expert for each pair of a row and a column.
            columns = 2 * int(expected.num_experts**0.5)
        assert any(tensor.shape[-1] == columns for tensor in seen)
        for parameter in found[name].parameters():
            if parameter.requires_grad:
                assert parameter.grad.isfinite().all()
                assert parameter.grad.abs().max() > 0


@each_family
def test_a_family_has_the_same_random_weights_at_every_call(family: str) -> None:
    first, second = tiny(family), tiny(family)
    assert first.training
    second_state = second.state_dict()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second_state[name]), name
    # Routers that start at zero would tie all experts.
    for router in routers(first).values():
        assert max(weight.std() for weight in router.parameters() if weight.dim() == 2) > 0.005


@each_family
def test_a_configuration_states_the_expected_experts_of_each_token(family: str) -> None:
    config = tiny(family).config.get_text_config()
    config = getattr(config, "ffn_config", config)
    stated = {getattr(config, name) for name in TOP_K if hasattr(config, name)}
    assert stated == (set() if family in FIXED else {EXPECTED[family].top_k})


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_changes_go_to_the_text_part(family: str) -> None:
    config = tiny(family, num_experts_per_tok=3).config.get_text_config()
    assert config.num_experts_per_tok == 3


@pytest.mark.parametrize("family", ["mixtral", "nllb-moe", "openai_privacy_filter"])
def test_a_task_loss_is_that_of_the_labels_given(family: str) -> None:
    model, ids = tiny(family), tokens()
    assert not torch.equal(loss(model, ids), loss(model, ids, labels=torch.ones_like(ids)))


def test_the_common_families_are_families() -> None:
    assert len(COMMON) == 12
    assert set(COMMON) < set(FAMILIES)
    assert set(EXPECTED) == set(FAMILIES)


def test_every_package_of_transformers_that_chooses_experts_has_a_family() -> None:
    choosing = {
        name
        for name, source in sources().items()
        if re.search(r"\btop_?k", source, re.IGNORECASE) and re.search("expert", source)
    }
    assert len(choosing) > 60
    missing = choosing - {package(family) for family in FAMILIES}
    assert not missing, f"add a tiny model of {sorted(missing)} to family_configs.py"


def test_every_router_class_of_transformers_is_in_a_tiny_model_or_explained() -> None:
    defined = {
        name
        for source in sources().values()
        for name in re.findall(r"^class (\w+)\(", source, re.MULTILINE)
        if named_like_a_router(name) and name not in WITHOUT_NEWER
    }
    built = {
        type(module).__name__
        for family in FAMILIES
        for module in routers(tiny(family)).values()
        if named_like_a_router(type(module).__name__)
    }
    assert built <= defined
    missing = defined - built - set(WITHOUT)
    assert not missing, f"{sorted(missing)}: add a tiny model, or a reason to WITHOUT"
    stale = set(WITHOUT) - defined
    assert not stale, f"{sorted(stale)} are gone from Transformers: drop them from WITHOUT"
