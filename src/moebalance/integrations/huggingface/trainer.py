"""Follow a Hugging Face Trainer: step, log, save beside its checkpoints and resume with it."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from moebalance.balancing import Balancing
from moebalance.distributed import refuse_several
from moebalance.integrations.huggingface.hooks import silence_native_loss
from moebalance.integrations.huggingface.routers import transformers_model

STATE_FILE = "moebalance.safetensors"
"""Name of the balancing state beside a checkpoint's own files."""


class BalanceCallback(TrainerCallback):
    """Let a Hugging Face Trainer (or TRL's) drive the balancing.

    Ends the balancing step with the optimizer step, adds the metrics to the trainer's logs, saves
    the state beside each checkpoint and takes it up again on resuming.

    Args:
        balancing: what `moebalance.attach` returned.
        prefix: put before each metric's name in the logs.
        resume_from: folder of the checkpoint to resume from; found by itself where the checkpoint
            lies in the trainer's own output folder.
    """

    def __init__(
        self, balancing: Balancing, *, prefix: str = "moe/", resume_from: str | Path | None = None
    ) -> None:
        self.balancing, self.prefix = balancing, prefix
        self.resume_from = None if resume_from is None else Path(resume_from)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the scale for losses made by the trainer, and resume if the trainer does.

        Raises:
            RuntimeError: training on more than one process.
            FileNotFoundError, ValueError: the trainer resumes, and there is no state that fits.
        """
        refuse_several(args.world_size)
        model = transformers_model(kwargs["model"])
        if model is not None:
            self.balancing.on_detach(silence_native_loss(model))
        self.balancing.set_loss_scale(1 / args.gradient_accumulation_steps)
        self.balancing.discard()
        if state.global_step == 0:
            return
        folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step == self.balancing.steps and not (folder / STATE_FILE).is_file():
            return  # loaded by hand
        load(self.balancing, folder)
        if state.global_step != self.balancing.steps:
            raise ValueError(
                f"{folder / STATE_FILE} was saved after {self.balancing.steps} steps, but training "
                f"resumes at step {state.global_step}: give the checkpoint that is resumed from as "
                "BalanceCallback(..., resume_from=...)."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the balancing step."""
        self.balancing.step()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the metrics to a training log entry."""
        if logs is None or "loss" not in logs:
            return
        found = {self.prefix + name: value for name, value in self.balancing.metrics().items()}
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state beside the checkpoint just written."""
        if state.is_world_process_zero:
            save(self.balancing, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def lead(self, trainer: Any) -> None:
        """Move this callback to the front, so that W&B, TensorBoard and others log the metrics too.

        A Trainer calls its reporters before the callbacks it is given.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)


def save(balancing: Balancing, folder: str | Path) -> Path:
    """Write the balancing state into a checkpoint folder, whole or not at all."""
    state = balancing.state_dict()
    tensors = {
        f"{name}/{key}": tensor.cpu().contiguous()
        for name, layer in state.pop("layers").items()
        for key, tensor in layer.items()
    }
    path = Path(folder) / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"moebalance": json.dumps(state)})
    os.replace(partial, path)
    return path


def load(balancing: Balancing, folder: str | Path) -> None:
    """Take up the balancing state that `save` wrote into a checkpoint folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, foreign, or does not fit.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"No balancing state at {path}: this checkpoint was saved without a BalanceCallback, "
            "or lies elsewhere; then give its folder as BalanceCallback(..., resume_from=...)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("moebalance")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({error}): resume from an earlier checkpoint."
        ) from error
    if metadata is None:
        raise ValueError(f"{path} was not written by moebalance: it carries no description.")
    state = json.loads(metadata)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition("/")
        layers.setdefault(name, {})[leaf] = tensor
    balancing.load_state_dict({**state, "layers": layers})
