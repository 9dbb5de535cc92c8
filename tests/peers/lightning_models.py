"""Modules and trainers for the tests of Lightning; processes that they start import this alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

import moebalance as mb
from moebalance.integrations.lightning import BalanceCallback
from tiny_moe import TinyMoE, hidden

STEADY = mb.PhiBalancing(strength=0.1, rate=0.5, peek=False)
"""Its gradient does not depend on how a step is split."""


@dataclass(frozen=True)
class FixedPrice(mb.Method):
    """Charge the same price whatever happens: its gradient is additive over any split."""

    strength: float

    def loss_price(self, state: Any, batch: mb.routing.Batch) -> Tensor:
        return self.strength * torch.linspace(-1, 1, batch.routing.num_experts)


class Plain(LightningModule):
    """Two micro-batches of rows, or as many as asked for, and the trainer's own optimization."""

    def __init__(self, method: mb.Method = STEADY, *, rows: int = 4, batch: int = 2) -> None:
        super().__init__()
        self.model = TinyMoE(method)
        self.balancing = mb.attach(self.model)
        self.rows, self.batch = rows, batch

    def training_step(self, x: Tensor, index: int) -> Tensor | None:
        return self.model(x).mean()

    def validation_step(self, x: Tensor, index: int) -> None:
        self.model(x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self) -> DataLoader[Tensor]:
        # Shared out in order; the sampler that Lightning would put in shuffles.
        mine = hidden(self.rows, 5)[self.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=self.batch)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(hidden(2, 5, seed=1), batch_size=1)


class Aside(Plain):
    """Balanced by layers that are no part of the module, as a Transformers model is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        router = self.model.router
        del self.model.router
        object.__setattr__(self.model, "router", router)


class ByHand(Plain):
    """Optimizes by hand: each batch is split in `parts`, and stepped on `times`."""

    def __init__(
        self, *args: Any, parts: int = 1, times: int = 1, follows: bool = True, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = False
        self.parts, self.times, self.follows = parts, times, follows

    def training_step(self, x: Tensor, index: int) -> None:
        optimizer = self.optimizers()
        for _ in range(self.times):
            optimizer.zero_grad()
            for part in x.chunk(self.parts):
                loss = self.model(part).mean()
                if self.follows:
                    loss = self.balancing.follow(loss)
                self.manual_backward(loss / self.parts)
            optimizer.step()


class Unrounded(MixedPrecision):
    """A gradient scaler as for half precision, which a CPU would compute in too coarsely."""

    def __init__(self, scale: float = 2.0**9) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))

    def autocast_context_manager(self) -> Any:
        return nullcontext()


class KeepGradient(Callback):
    """The router's gradient as each optimizer step sees it."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(pl_module.model.gate.grad.clone())


class WriteEnd(Callback):
    """Write what the training came to, from the process that holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save(outcome(pl_module.model, pl_module.balancing), self.path)


def trainer(callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **settings})


def fitted(module: Plain, *others: Callback, **settings: Any) -> mb.Balancing:
    trainer([BalanceCallback(module.balancing), *others], **settings).fit(module)
    return module.balancing


def outcome(model: nn.Module, balancing: mb.Balancing) -> dict[str, Any]:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved = balancing.state_dict()
    ended = {"steps": saved["steps"], **balancing.metrics()}
    return {"weights": weights, "state": saved["layers"], "ended": ended}


def fabric_training(fabric: Fabric, path: Path, steps: int = 3, parts: int = 2) -> None:
    """A loop of one's own, as docs/lightning.md shows it, on rows that the ranks share out."""
    raw = TinyMoE(STEADY)
    balancing = mb.attach(raw)
    model, optimizer = fabric.setup(raw, torch.optim.SGD(raw.parameters(), lr=0.5))
    for step in range(steps):
        mine = hidden(8, 5, seed=step)[fabric.global_rank :: fabric.world_size]
        for number, part in enumerate(mine.chunk(parts), start=1):
            with fabric.no_backward_sync(model, enabled=number < parts):
                loss = balancing.follow(model(part).mean())
                fabric.backward(loss / parts)
        balancing.reduce()
        optimizer.step()
        optimizer.zero_grad()
        balancing.step()
    if fabric.global_rank == 0:
        torch.save(outcome(raw, balancing), path)


def same(a: Any, b: Any, **tolerance: float) -> bool:
    torch.testing.assert_close(a, b, **tolerance)
    return True
