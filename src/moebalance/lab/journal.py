"""What a run logs: its header, and a row for each step, load snapshot and evaluation."""

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from moebalance import Balancing, __version__
from moebalance.integrations.huggingface import find_sites
from moebalance.lab.evaluate import Choices, evaluate, fractions
from moebalance.lab.identity import Identity
from moebalance.lab.inputs import Texts
from moebalance.lab.recipe import Recipe
from moebalance.lab.text.batches import TokenDataset
from moebalance.methods.describe import describe
from moebalance.runlog import RunLog

OLD, SEEN = "old_", "seen_"
"""Prefixes of numbers on the old text, and on a sample of the training split."""


class Journal(TrainerCallback):
    """Writes the run log: a row a step, load snapshots, evaluations.

    A fine-tuning run is evaluated before its first step too.

    Args:
        log: the log to write.
        recipe: says how often each row is written.
        balancing: the handle of the model in training.
        held_out: sequences to evaluate on.
        also: other sequences to evaluate on, by the prefix of their numbers.
    """

    def __init__(
        self,
        log: RunLog,
        recipe: Recipe,
        balancing: Balancing,
        held_out: TokenDataset,
        also: Mapping[str, TokenDataset],
    ) -> None:
        self.log, self.spec = log, recipe.train
        self.balancing, self.held_out, self.also = balancing, held_out, also
        self.choices: Choices = {}
        self.fine_tunes = recipe.checkpoint is not None
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate a model before it is fine-tuned."""
        if self.fine_tunes and state.global_step == 0:
            self._evaluate(kwargs["model"], 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.step_time_s = time.perf_counter() - self.started

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write what is due after this step."""
        if logs is None or "loss" not in logs:
            return
        step = state.global_step
        own = {k.removeprefix("moe/"): v for k, v in logs.items() if k.startswith("moe/")}
        self.log.write(
            "step",
            step=step,
            loss=logs["loss"],
            lr=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm"),
            step_time_s=self.step_time_s,
            **own,
        )
        if step % self.spec.snapshot_every == 0 or step == args.max_steps:
            loads = self.balancing.loads().values()
            hard, soft = (torch.stack(load) for load in zip(*loads, strict=True))
            self.log.write("snapshot", step=step, load=fractions(hard), soft=fractions(soft))
        every = self.spec.eval_every
        if step == args.max_steps or (every and step % every == 0):
            self._evaluate(kwargs["model"], step)

    def _evaluate(self, model: PreTrainedModel, step: int) -> None:
        size = self.spec.batch_size
        found = evaluate(
            model, self.balancing, self.held_out, batch_size=size, choices=self.choices
        )
        for prefix, text in self.also.items():
            more = evaluate(model, self.balancing, text, batch_size=size)
            found |= {prefix + key: v for key, v in more.items() if not isinstance(v, list)}
        self.log.write("eval", step=step, **found)


def header(
    recipe: Recipe, identity: Identity, model: PreTrainedModel, balancing: Balancing, texts: Texts
) -> dict[str, Any]:
    """The first line of a run log."""
    site = find_sites(model)[0]
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    described: dict[str, Any] = {
        "architecture": recipe.model.get("architecture", model.config.model_type),
        "parameters": total,
        "active_parameters": total - round(experts * (1 - site.top_k / site.num_experts)),
        "num_experts": site.num_experts,
        "top_k": site.top_k,
        "layers": list(balancing.layers),
    }
    if recipe.checkpoint is not None:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        described |= {
            "checkpoint": recipe.checkpoint,
            "fingerprint": identity.fingerprint,
            "trained_parameters": trained,
        }
    data = texts.data.header()
    if texts.old is not None:
        data["old"] = texts.old.header()
    return {
        "format": 1,
        "name": recipe.name,
        "method": identity.method,
        "method_repr": identity.method_repr,
        "parts": describe(balancing.method),
        "seed": identity.seed,
        "batching": identity.batching,
        "steps": recipe.train.steps,
        "recipe": recipe.as_dict(),
        "versions": {
            "moebalance": __version__,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "data": data,
        "model": described,
    }


def _commit() -> str | None:
    """Commit of this library's source tree, where it runs from one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
