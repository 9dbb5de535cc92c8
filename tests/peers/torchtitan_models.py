"""torchtitan on a CPU: a tiny DeepSeek-V3, tokens for it, and its trainer without a GPU's parts."""

from __future__ import annotations

import dataclasses
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

with (
    # torchtitan takes a machine without accelerator for one with CUDA, once, when it is imported;
    # hence tests take its names from here.
    mock.patch("torch._utils._get_available_device_type", return_value="cpu"),
    warnings.catch_warnings(),
):
    # Of torch's own modules, by torch's compiler.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import DeviceMemStats
    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
    from torchtitan.config.manager import ConfigManager as ConfigManager
    from torchtitan.distributed import ParallelDims as ParallelDims
    from torchtitan.distributed import activation_checkpoint as activation_checkpoint
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.common.moe import MoE as MoE
    from torchtitan.models.common.moe import TokenChoiceTopKRouter as TokenChoiceTopKRouter
    from torchtitan.models.common.rope import ComplexRoPE
    from torchtitan.models.deepseek_v3 import _build_dsv3_layers, model_registry
    from torchtitan.models.llama3 import model_registry as llama3  # noqa: F401
    from torchtitan.models.qwen3 import model_registry as qwen3  # noqa: F401
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.tools import utils
    from torchtitan.trainer import Trainer

assert utils.device_type == "cpu"

EXPERTS, TOP_K, DIM, WORDS, BATCH, LENGTH = 8, 2, 64, 256, 2, 16
LAST = "layers.2.moe.router"
"""The last router of `tiny_spec()`."""


def tiny_spec(*, layers: int = 3, dense: int = 1) -> ModelSpec:
    """DeepSeek-V3 of 64 channels: `dense` layers without experts, then some with 8."""
    spec = model_registry("debugmodel")
    model = spec.model
    blocks = _build_dsv3_layers(
        n_layers=layers,
        n_dense_layers=dense,
        dim=DIM,
        n_heads=2,
        q_lora_rank=0,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        mscale=0.7,
        dense_hidden_dim=64,
        moe_hidden_dim=32,
        num_experts=EXPERTS,
        num_shared_experts=1,
        router_top_k=TOP_K,
        router_score_func="sigmoid",
        router_route_norm=True,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=16, max_seq_len=4 * LENGTH, theta=10000.0),
    )
    for block in blocks:
        # The one kind of attention that runs here without masks.
        block.attention.inner_attention = ScaledDotProductAttention.Config()
    embeddings = dataclasses.replace(model.tok_embeddings, num_embeddings=WORDS, embedding_dim=DIM)
    spec.model = dataclasses.replace(
        model,
        dim=DIM,
        vocab_size=WORDS,
        layers=blocks,
        tok_embeddings=embeddings,
        norm=dataclasses.replace(model.norm, normalized_shape=DIM),
        lm_head=dataclasses.replace(model.lm_head, in_features=DIM, out_features=WORDS),
    )
    return spec


def adam(lr: float) -> OptimizersContainer.Config:
    """Adam as torchtitan configures it, in the one implementation that needs no GPU."""
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": lr})
    return OptimizersContainer.Config(param_groups=[group], implementation="for-loop")


def tiny_config(
    folder: Path | None = None, *, steps: int = 2, lr: float = 1e-2, **spec: Any
) -> Trainer.Config:
    """What a function of a config_registry returns, cut down; checkpoints each step in `folder`."""
    return Trainer.Config(
        model_spec=tiny_spec(**spec),
        loss=CrossEntropyLoss.Config(global_vocab_size=WORDS),
        tokenizer=NoTokenizer.Config(),
        dataloader=Tokens.Config(),
        optimizer=adam(lr),
        training=TrainingConfig(
            local_batch_size=BATCH,
            seq_len=LENGTH,
            steps=steps,
            disable_cuda_graphs=True,
            mixed_precision_param="float32",
            max_norm=1e9,
        ),
        parallelism=ParallelismConfig(),
        checkpoint=CheckpointManager.Config(
            enable=folder is not None, interval=1, last_save_model_only=False
        ),
        activation_checkpoint=None,
        debug=DebugConfig(seed=0),
        dump_folder=str(folder),
    )


class NoTokenizer(BaseTokenizer):
    """The tokens come as numbers."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: Any, **kwargs: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return WORDS


class Tokens(BaseDataLoader):
    """Batches by their number in the run, dealt out to the ranks in turn."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **_: Any) -> None:
        self.ranks, self.rank, self.taken = dp_world_size, dp_rank, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            words = tokens(self.ranks * self.taken + self.rank)
            self.taken += 1
            positions = torch.arange(LENGTH).repeat(BATCH, 1)
            yield {"input": words[:, :-1], "positions": positions}, words[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def tokens(number: int) -> Tensor:
    """A batch of words, by a law that favours a few."""
    chance = torch.rand(BATCH, LENGTH + 1, generator=torch.Generator().manual_seed(number))
    return (chance**4 * WORDS).long()


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what torch and torchtitan say of CPUs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In CPU autocast")
        warnings.filterwarnings("ignore", message="DTensor .* may not have complete support")
        yield


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        yield
    finally:
        _MESHES.clear()
        dist.destroy_process_group()


@contextmanager
def trainer(config: Trainer.Config) -> Iterator[Trainer]:
    """torchtitan's own trainer in the process group in force, without what only a GPU has."""
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=str(dist.get_rank())),
        mock.patch("torchtitan.components.metrics.build_device_memory_monitor", _NoMonitor),
        mock.patch("torchtitan.trainer.time.sleep"),
        mock.patch("torchtitan.trainer.dist_utils.set_pg_timeouts"),
        mock.patch("torchtitan.distributed.fsdp.disable_fsdp_gradient_division", _plain_sums),
        mock.patch("torchtitan.trainer.ParallelDims.from_config", _parallel_dims),
        quiet(),
    ):
        built = config.build()
        try:
            yield built
        finally:
            built.close()
            gc.enable()


def train(config: Trainer.Config) -> Trainer:
    """Train to the end; the trainer, for looking at."""
    with trainer(config) as built:
        built.train()
    return built


def state(built: Trainer) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint, whole."""
    found = {k: v for part in built.model_parts for k, v in part.state_dict().items()}
    return {k: whole(v).clone() for k, v in found.items()}


def gate_gradients(config: Trainer.Config) -> list[Tensor]:
    """The gradient of the last router's gate at each optimizer step of a training."""
    seen: list[Tensor] = []
    with trainer(config) as built:
        modules = dict(built.model_parts[-1].named_modules())
        (gate,) = [m.gate for name, m in modules.items() if _plain(name) == LAST]
        built.optimizers.register_step_pre_hook(
            lambda *_: seen.append(whole(gate.weight.grad).clone())
        )
        built.train()
    return seen


def whole(tensor: Tensor) -> Tensor:
    """A distributed tensor gathered; any other as it is."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


class _NoMonitor:
    device_name = "cpu"

    def get_peak_stats(self) -> DeviceMemStats:
        return DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self) -> None:
        pass


def _parallel_dims(config: ParallelismConfig, world_size: int) -> ParallelDims:
    """The same meshes for all trainers of a process that ask for equal ones.

    DTensor remembers an equal mesh of an earlier trainer, and FSDP insists on the very object.
    """
    if repr(config) not in _MESHES:
        _MESHES[repr(config)] = _FROM_CONFIG(config, world_size)
    return _MESHES[repr(config)]


_FROM_CONFIG = ParallelDims.from_config
_MESHES: dict[str, ParallelDims] = {}


def _plain_sums(model: nn.Module) -> None:
    """FSDP adds gradients up undivided, as torchtitan has it, in the way that gloo knows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
