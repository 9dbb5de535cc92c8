"""Watch one run without the balancing: count tokens by hand and write down what was seen.

A token counts by hand where it is not the padding token, in each forward that is trained on. The
padding token is in no text.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

import moebalance as mb
from moebalance.integrations.huggingface.reporting import calling_trainer


class Spy(TrainerCallback):
    """Writes its record to the file named by `CLIENT_RECORD`. Give it after the balancing."""

    def __init__(self) -> None:
        self.by_hand = self.places = self.counted = 0.0
        self.losses: list[float] = []
        self.moe = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what goes into the innermost model, and what each balancing step counted."""
        callbacks = calling_trainer(self).callback_handler.callbacks
        (callback,) = [c for c in callbacks if isinstance(c, mb.huggingface.BalanceCallback)]
        self.balancing = callback.balancing
        self.balancing.on_step(self._stepped)
        model = kwargs["model"]
        self.gates = {
            name: any(p.requires_grad for p in gate.parameters())
            for name, gate in model.named_modules()
            if type(gate).__name__.endswith("TopKRouter") and "original_module" not in name
        }
        (inner,) = [m for m in model.modules() if type(m).__name__ == "Qwen3MoeModel"]
        self.pad = inner.config.pad_token_id
        inner.register_forward_pre_hook(self._entered, with_kwargs=True)

    def _entered(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            self.by_hand += int((ids != self.pad).sum())
            self.places += ids.numel()

    def _stepped(self) -> None:
        self.counted += self.balancing.metrics()["tokens"]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the loss, and see whether the metrics reach the log."""
        logs = kwargs["logs"]
        self.losses += [float(logs["loss"])] if "loss" in logs else []
        self.moe |= "moe/maxvio" in logs

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the record."""
        record = {
            "transformers": transformers.__version__,
            "steps": self.balancing.steps,
            "counted": int(self.counted),
            "by_hand": int(self.by_hand),
            "places": int(self.places),
            "balanced": len(self.balancing.layers),
            "frozen": sum(not trains for trains in self.gates.values()),
            "loss": self.losses[-1] if self.losses else None,
            "finite": bool(self.losses) and all(map(math.isfinite, self.losses)),
            "logged": self.moe,
        }
        Path(os.environ["CLIENT_RECORD"]).write_text(json.dumps(record), encoding="utf-8")
