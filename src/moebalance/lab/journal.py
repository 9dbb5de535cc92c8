"""What a run writes down: its header, and a row for each step, load snapshot and evaluation."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, TrainerCallback

from moebalance import __version__
from moebalance.core.handle import Balancing
from moebalance.integrations.huggingface import find_sites
from moebalance.lab.evaluate import Choices, evaluate, fractions
from moebalance.lab.inputs import Texts
from moebalance.lab.recipe import Recipe
from moebalance.lab.text.batches import TokenDataset
from moebalance.methods.describe import describe
from moebalance.runlog import RunLog, read_run

OLD = "old_"
"""Before the name of a number that was measured on the old text."""


class Identity(NamedTuple):
    """What tells a run from the others of its recipe.

    Attributes:
        method: its word.
        method_repr: its `repr`.
        seed: of fresh weights and data order.
        batching: kind of micro-batch.
        fingerprint: of the checkpoint that fine-tuning starts from; None from scratch.
    """

    method: str
    method_repr: str
    seed: int
    batching: str
    fingerprint: str | None


class Journal(TrainerCallback):
    """Writes the run log: a row a step, load snapshots, evaluations.

    A fine-tuning run is evaluated before its first step as well.

    Args:
        log: where to.
        recipe: how often.
        balancing: the handle of the model in training.
        held_out: the sequences to evaluate on.
        old: those of the old text, whose numbers are called `old_…`; None for none.
    """

    def __init__(
        self,
        log: RunLog,
        recipe: Recipe,
        balancing: Balancing,
        held_out: TokenDataset,
        old: TokenDataset | None = None,
    ) -> None:
        self.log, self.spec = log, recipe.train
        self.balancing, self.held_out, self.old = balancing, held_out, old
        self.choices: Choices = {}
        self.fine_tunes = recipe.checkpoint is not None
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate a model that is to be fine-tuned."""
        if self.fine_tunes and state.global_step == 0:
            self._evaluate(kwargs["model"], 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
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
        if self.old is not None:
            old = evaluate(model, self.balancing, self.old, batch_size=size)
            found |= {OLD + key: value for key, value in old.items() if not isinstance(value, list)}
        self.log.write("eval", step=step, **found)


def header(
    recipe: Recipe, identity: Identity, model: PreTrainedModel, balancing: Balancing, texts: Texts
) -> dict[str, Any]:
    """What the first line of a run log says."""
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


def refuse_other_run(path: Path, recipe: Recipe, identity: Identity) -> None:
    """Refuse to go on with a run that was started as another one.

    Raises:
        ValueError: says what differs.
    """
    then = read_run(path).header
    for key in ("method", "method_repr", "seed", "batching"):
        _refuse_difference(path, key, then.get(key), getattr(identity, key))
    _refuse_difference(path, "recipe", *map(_as_logged, (then.get("recipe"), recipe.as_dict())))
    _refuse_difference(path, "checkpoint", logged_fingerprint(then), identity.fingerprint)


def logged_fingerprint(header: Mapping[str, Any]) -> str | None:
    """Fingerprint of the checkpoint that a logged run started from; None if it had none."""
    model = header.get("model")
    found = model.get("fingerprint") if isinstance(model, Mapping) else None
    return None if found is None else str(found)


def _refuse_difference(path: Path, key: str, then: Any, now: Any) -> None:
    if then != now:
        raise ValueError(
            f"{path} is of a run with another {key}: {then!r}, not {now!r}. "
            "Resume with what it was started with, or choose another folder."
        )


def _as_logged(recipe: Any) -> Any:
    """A recipe as this version logs it: one of an earlier version gets the newer keys' defaults.

    Without how its model is laid out over ranks, which may change.
    """
    logged = json.loads(json.dumps(Recipe.parse(recipe, source="its recipe").as_dict()))
    del logged["train"]["sharded"]
    return logged


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
