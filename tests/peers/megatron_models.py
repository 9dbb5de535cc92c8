"""Megatron-Core on a CPU: what stands in for CUDA, and towers of its MoE layers under its schedule.

The router, the MoE layer, DistributedDataParallel, `finalize_model_grads` and the schedule are
Megatron's own.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moebalance import Balancing, Method

with warnings.catch_warnings():
    # It tells of what is not installed (Transformer Engine, Apex) and of its own old names.
    warnings.simplefilter("ignore")
    import megatron.core
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.module import Float16Module, MegatronModule
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moebalance.integrations.megatron import attach, balanced_spec


__all__ = [
    "Float16Module",
    "GPTModel",
    "RouterReplay",
    "RouterReplayAction",
    "TopKRouter",
    "dist_checkpointing",
    "get_gpt_decoder_block_spec",
]

HIDDEN, EXPERTS, TOP_K = 16, 4, 2
RELEASE = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])


def empty_log() -> tuple[str, Any]:
    """Where Megatron keeps the losses that it logs, and a new empty log."""
    if RELEASE < (0, 18):
        return "megatron.core.transformer.moe.moe_utils._MOE_LAYER_WISE_LOGGING_TRACKER", {}
    return "megatron.core.transformer.moe.moe_logging._MOE_METRICS_TRACKER", None


class _CpuForCuda(TorchFunctionMode):
    """The schedule makes its token counter on "cuda"."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Let Megatron-Core run without a GPU, and leave nothing of it behind."""
    scaler = moe_utils.MoEAuxLossAutoScaler
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")))
        enter(patch.object(torch.cuda, "current_stream", lambda: None))
        enter(patch.object(torch.cuda, "synchronize", lambda: None))
        if RELEASE < (0, 18):
            # It asks for this name where Transformer Engine is not installed.
            enter(patch.object(moe_utils, "te_general_gemm", None, create=True))
        enter(patch(*empty_log()))
        enter(patch.object(CudaRNGStatesTracker, "fork", lambda self, name="": nullcontext()))
        enter(patch.object(scaler, "main_loss_backward_scale", None))
        enter(torch.compiler.set_stance("force_eager"))
        enter(_CpuForCuda())
        yield


@contextmanager
def group_of_one() -> Iterator[None]:
    """torch.distributed in one process, which Megatron cannot do without."""
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """All that a model in one process needs."""
    with group_of_one(), on_cpu(), parallel():
        yield


@contextmanager
def parallel(**sizes: int) -> Iterator[None]:
    """Megatron's process groups over the ranks that there are."""
    parallel_state.initialize_model_parallel(**sizes)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def make_config(**changes: Any) -> TransformerConfig:
    """A small MoE configuration without any balancing."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOP_K,
        "moe_ffn_hidden_size": HIDDEN,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "finalize_model_grads_func": finalize_model_grads,
    }
    # Its own default is deprecated.
    settings["cuda_graph_scope" if RELEASE < (0, 18) else "cuda_graph_modules"] = []
    return TransformerConfig(**(settings | changes))


class Tower(MegatronModule):
    """MoE layers on top of one another, without attention: context parallelism needs none of it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self, config: TransformerConfig, submodules: MoESubmodules, **options: Any
    ) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList()
        for number in range(config.num_layers):
            layer = MoELayer(config, submodules, layer_number=number + 1, **options)
            layer.set_layer_number(number + 1)
            self.layers.append(layer)

    def set_input_tensor(self, tensors: Any) -> None:
        """Part of what the schedule asks of a model."""

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden, padding_mask=padding_mask)[0]
        return hidden


def make_gpt(config: TransformerConfig, method: Method, *, vocabulary: int, length: int) -> Any:
    """This rank's pipeline stage of a GPT, with the same weights however it is cut."""
    stage = GPTModel(
        config,
        balanced_spec(get_gpt_decoder_block_spec(config, use_transformer_engine=False), method),
        vocabulary,
        length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
    )
    for name, weight in stage.named_parameters():
        number, rest = layer_of(stage, name)
        if weight.dim() > 1:
            seed = 1000 * number + sum(map(ord, rest))
            weight.data.copy_(normal(weight.shape, seed) / weight.shape[-1] ** 0.5)
    return stage


def layer_of(stage: nn.Module, name: str) -> tuple[int, str]:
    """The layer's number in the whole model, 0 outside of layers, and the rest of the name."""
    found = re.fullmatch(r"(?:module\.)*decoder\.layers\.(\d+)\.(.*)", name)
    if found is None:
        return 0, name
    return stage.decoder.layers[int(found[1])].layer_number, found[2]


def make_tower(config: TransformerConfig, method: Method | None = None, **options: Any) -> Tower:
    """The same weights on every layout; Megatron's own router where there is no method."""
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts).submodules.mlp
    if method is not None:
        spec = balanced_spec(spec, method)
    # From 0.18 a layer sits in its spec as functools.partial(MoELayer, submodules=...).
    parts = spec.keywords["submodules"] if RELEASE >= (0, 18) else spec.submodules
    tower = Tower(config, parts, **options)
    for number, layer in enumerate(tower.layers):
        # Far from uniform, so that there is something to balance.
        layer.router.weight.data = normal(layer.router.weight.shape, seed=number)
        experts = zip(layer.local_expert_indices, layer.experts.local_experts, strict=True)
        for index, expert in experts:
            for weight in expert.parameters():
                _fill(weight, seed=100 + index)
    return tower


def normal(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _fill(weight: nn.Parameter, seed: int) -> None:
    """This tensor-parallel rank's part of a weight."""
    ranks = parallel_state.get_expert_tensor_parallel_world_size()
    shape = list(weight.shape)
    shape[weight.partition_dim] *= ranks
    part = parallel_state.get_expert_tensor_parallel_rank()
    whole = normal(shape, seed) / HIDDEN**0.5
    weight.data.copy_(whole.chunk(ranks, dim=weight.partition_dim)[part])


def wrap(tower: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(tower.config, DistributedDataParallelConfig(), tower)


class MicroBatch(NamedTuple):
    """One rank's part of a micro-batch.

    Attributes:
        hidden: (S, B, H).
        padding: (B, S), True for padding.
        tokens: how many tokens have a loss, the same on tensor-parallel ranks.
    """

    hidden: Tensor
    padding: Tensor | None = None
    tokens: int = 0


def run_step(
    model: DistributedDataParallel,
    batches: Sequence[MicroBatch],
    task: Callable[[Tensor], Tensor] = lambda output: 0 * output.sum(),
) -> dict[str, Tensor]:
    """One training step of a tower; see `run_schedule`.

    Args:
        model: wrapped.
        batches: micro-batches of this rank.
        task: loss from the output; zero where left out, so that the gradients are those of the
            balancing term alone.
    """
    per_token = model.config.calculate_per_token_loss
    left = iter(batches)

    def forward_step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(left)
        tokens = (torch.tensor(batch.tokens, dtype=torch.int),) if per_token else ()
        output = chunk(batch.hidden, padding_mask=batch.padding)
        return output, lambda out: (task(out), *tokens, {})

    return run_schedule(model, forward_step, micro_batches=len(batches))


def run_schedule(
    model: DistributedDataParallel,
    forward_step: Any,
    *,
    micro_batches: int,
    shape: tuple[int, int] = (1, 1),
) -> dict[str, Tensor]:
    """One training step without the optimizer's part; the routers' gradients as it would see them.

    Args:
        model: wrapped.
        forward_step: as Megatron's schedules take it.
        micro_batches: how many.
        shape: of a micro-batch, (length, sequences), which pipelines must know.
    """
    model.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=model,
        num_microbatches=micro_batches,
        seq_length=shape[0],
        micro_batch_size=shape[1],
    )
    found = {n: p.main_grad for n, p in model.named_parameters() if n.endswith("router.weight")}
    return {name.removeprefix("module."): gradient.clone() for name, gradient in found.items()}


def balanced(method: Method, **changes: Any) -> tuple[DistributedDataParallel, Balancing]:
    """A wrapped tower and its handle."""
    model = wrap(make_tower(make_config(**changes), method))
    return model, attach(model)
