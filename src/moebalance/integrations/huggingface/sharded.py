"""FSDP2 under a Hugging Face Trainer, and checkpoints that any number of ranks can take up.

Transformers shards a model by itself (`DistributedConfig`), on CPUs as well as on accelerators, and
its Trainer then leaves the model as it is. Accelerate 1.15 shards on accelerators only: its
`AcceleratorState.__init__` takes FSDP up where the ranks are MULTI_GPU and its kin, and passes over
MULTI_CPU, which then trains whole copies and says nothing. What the Trainer of Transformers 5.23
lacks is a checkpoint of a model that Transformers sharded: it refuses to save the optimizer. Here
`torch.distributed.checkpoint` saves model, optimizer, scheduler and balancing state as one.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainingArguments

from moebalance.core.handle import Balancing
from moebalance.integrations.huggingface.contents import load_parts, read_contents, save_parts

PARTS = "distributed"
"""Name of the folder in a checkpoint that holds what `torch.distributed.checkpoint` wrote."""

# By parameter name: groups are numbered otherwise on another number of ranks.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


class ShardedTrainer(Trainer):
    """A Trainer whose checkpoints are torch's distributed ones, on one process or on many.

    Give it a `BalanceCallback(balancing, state_file=False)`: the balancing state is in there.

    Args:
        model: a Transformers model; on several ranks `shard` it first.
        args: its settings, with `save_only_model=True`: what else there is, is saved here.
        balancing: the handle on the model's balanced layers.
        **kwargs: what `Trainer` takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        balancing: Balancing,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args, **kwargs)
        self.balancing = balancing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint where the Trainer is about to; where a user asks, the model alone."""
        if output_dir is None or not _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir)
        self._save_rng_state(output_dir)
        with _one_process_is_meant():
            save_parts(self._parts(), folder / PARTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: all parts are loaded together, once there is an optimizer."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        parts, folder = self._parts(), Path(checkpoint) / PARTS
        with _one_process_is_meant():
            load_parts(parts, folder)
        model, optimizer = self._bare()
        set_model_state_dict(model, parts["model"])
        set_optimizer_state_dict(model, optimizer, parts["optimizer"], options=_BY_NAME)

    def _parts(self) -> dict[str, Any]:
        model, optimizer = self._bare()
        return {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=_BY_NAME),
            "scheduler": self.lr_scheduler,
            "balancing": self.balancing,
        }

    def _bare(self) -> tuple[nn.Module, Optimizer]:
        """Without Accelerate's wrapping, whose step has conditions: one step makes the state."""
        assert self.model is not None
        assert self.optimizer is not None
        return self.model, getattr(self.optimizer, "optimizer", self.optimizer)


def shard(model: PreTrainedModel) -> None:
    """Split a model's weights over the ranks there are by FSDP2, each layer a unit; attach before.

    Raises:
        ValueError: the installed Transformers does not shard models, or not this one.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1:
        return
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        prepare, distribute = model.prepare_distribute_model, model.maybe_distribute_model
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Transformers {version('transformers')} does not shard models as it should: train on "
            "whole copies, without [train] sharded (or accelerate's FSDP), or update it to 5.23."
        ) from error
    whole: Any = model
    first, last = whole.get_input_embeddings(), whole.get_output_embeddings()
    if getattr(first, "weight", None) is getattr(last, "weight", first):
        # torch 2.13 refuses a weight that two units hold: both ends are left to the root's unit.
        ends = {name for name, module in model.named_modules() if module in (first, last)}
        plan = {name: style for name, style in model.fsdp_plan.items() if name not in ends}
        whole.fsdp_plan = plan
    config, _, meshes = prepare(DistributedConfig(fsdp_size=ranks))
    distribute(model, config, meshes)


@contextmanager
def sharding_for_accelerate() -> Iterator[bool]:
    """Tell whether `accelerate launch` was asked for FSDP, and meanwhile keep Accelerate from it.

    Raises:
        ValueError: it was asked for FSDP1.
    """
    name = "ACCELERATE_USE_FSDP"
    asked = os.environ.get(name, "false").lower() == "true"
    if not asked:
        yield False
        return
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise ValueError(
            "accelerate's configuration asks for FSDP1, which flattens weights of different "
            "layers into one: give fsdp_version: 2 (or --fsdp_version 2)."
        )
    before = os.environ.pop(name)
    try:
        yield True
    finally:
        os.environ[name] = before


def is_distributed(checkpoint: Path) -> bool:
    """Whether a checkpoint is one of a `ShardedTrainer`."""
    return (checkpoint / PARTS).is_dir()


def missing_part(checkpoint: Path) -> str | None:
    """What a `ShardedTrainer`'s checkpoint lacks of what it says it holds; None if nothing.

    Raises:
        OSError, ValueError: its table of contents cannot be read, or is refused.
    """
    folder = checkpoint / PARTS
    ends: dict[str, int] = {}
    for part in read_contents(folder).storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            return f"{PARTS}/{name} is missing"
        if path.stat().st_size < end:
            return f"{PARTS}/{name} is cut off"
    return None


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Keep torch from remarking that a distributed checkpoint has to do with one process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
