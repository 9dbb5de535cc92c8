"""See what the experts of any model do, balanced or not.

A monitor counts what the routers really chose, K experts a token and under a selection bias if
there is one: in training once a token, whatever the checkpointing, and in evaluation apart from
it. It logs about a dozen scalars a step and load snapshots from which `moebalance report` makes its
pictures.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from moebalance import __version__
from moebalance.attachment import attach, own_routers
from moebalance.core.handle import Balancing, Loads
from moebalance.methods import NoBalancing
from moebalance.methods.describe import describe
from moebalance.metrics.image import DEAD
from moebalance.runlog import RunLog
from moebalance.words.methods import words_of

logger = logging.getLogger("moebalance")


def monitor(
    model: nn.Module | Balancing,
    log: str | Path | None = None,
    *,
    name: str | None = None,
    snapshot_every: int = 25,
    **named: Any,
) -> "Monitor":
    """Watch every router of a model; nothing of the model or its training changes.

    Args:
        model: any model that `attach` knows; or what `attach` returned, for one that is balanced.
        log: folder for a run log; None to only return the metrics, as all ranks but one should.
        name: of the run in reports; the model's class by default.
        snapshot_every: steps between load snapshots in the log.
        named: for a model of your own, which modules return the logits of its routers and how its
            layers choose: `routers`, `top_k` and the others of `attach`.

    Raises:
        ValueError: no router was found, or one of a kind that cannot be read; the log is another
            run's already; `snapshot_every` is below 1. Nothing is attached then.

    >>> import moebalance as mb
    >>> router = mb.BalancedRouter(mb.NoBalancing(), num_experts=4, top_k=2).eval()
    >>> with monitor(router) as watch:
    ...     _ = router(torch.eye(4))
    ...     watch.evaluate()["tokens"]
    4.0
    """
    if snapshot_every < 1:
        raise ValueError(
            f"snapshot_every={snapshot_every}: give the steps between load snapshots, 1 or more."
        )
    run_log = None if log is None else _new_log(log)
    if isinstance(model, Balancing):
        watched, balancing = None, model
    elif own_routers(model):
        watched, balancing = model, attach(model, **named)
    else:
        watched, balancing = model, attach(model, NoBalancing(), keep_native_loss=True, **named)
    return Monitor(watched, balancing, run_log, name=name, snapshot_every=snapshot_every)


class Monitor:
    """Metrics of a model's routers, step by step; made by `monitor`.

    As a context manager it ends the log and takes its hooks away on leaving.

    Attributes:
        model: what is watched; None if the monitor was made of a handle.
        balancing: the handle under it, for a `BalanceCallback` or for the loads of each layer.
    """

    def __init__(
        self,
        model: nn.Module | None,
        balancing: Balancing,
        log: RunLog | None,
        *,
        name: str | None,
        snapshot_every: int,
    ) -> None:
        self.model, self.balancing, self.snapshot_every = model, balancing, snapshot_every
        self._log = log
        self._counted: set[str] = set()
        self._told: set[str] = set()
        if self._log is not None:
            self._log.write("header", **_header(model, balancing, name))
        balancing.watch()

    def step(self, **scalars: float) -> dict[str, float]:
        """End an optimizer step: return its metrics, and log them beside `scalars`.

        Args:
            scalars: anything else to log, such as `loss=…`; a loss lets the report draw it.

        Raises:
            RuntimeError: no token was counted since the last step.
        """
        self.balancing.step()
        return self.record(**scalars)

    def record(self, **scalars: float) -> dict[str, float]:
        """Return and log the metrics of a step that was ended already, by `balancing.step()`."""
        found = self.balancing.metrics()
        self._write("step", {**found, **scalars})
        if self.balancing.steps % self.snapshot_every == 0:
            self._write("snapshot", _shares(self.balancing.loads()))
        return found

    def evaluate(self, **scalars: float) -> dict[str, float]:
        """Metrics of all forwards in evaluation mode since the last call; logged with `scalars`.

        Of this process alone, whatever other ranks evaluate.
        """
        found, loads = self.balancing.evaluation()
        self._tell_of_uncounted(loads)
        if found:
            counted = [hard for hard, _ in loads.values() if hard.sum() > 0]
            dead = sum(int((hard * len(hard) < DEAD).sum()) for hard in counted)
            self._write("eval", {**found, "dead_experts": dead, **_shares(loads), **scalars})
        return found

    def _tell_of_uncounted(self, loads: dict[str, Loads]) -> None:
        """Say once which routers have never counted a token in evaluation."""
        counted = {name for name, (hard, _) in loads.items() if hard.sum() > 0}
        never = [name for name in loads if name not in counted | self._counted | self._told]
        self._counted |= counted
        # Without a forward there is nothing to count, unless there was none ever.
        if never and (counted or not self._counted):
            self._told |= set(never)
            logger.warning(
                "moebalance: in evaluation, %d of %d watched routers counted no token (first: %s). "
                "Is this the model that ran? Does it call its routers, or compute past them in a "
                "fused kernel?",
                len(never),
                len(loads),
                never[0],
            )

    def close(self, *, error: BaseException | None = None) -> None:
        """End the log and take the monitor's hooks away; a handle that was given stays attached."""
        if self.model is not None:
            self.balancing.detach()
        if self._log is not None:
            self._log.__exit__(type(error) if error else None, error, None)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error=error)

    def _write(self, kind: str, row: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(kind, step=self.balancing.steps, **row)


def _new_log(path: str | Path) -> RunLog:
    """Open a run log that nobody has written to."""
    log = RunLog(path)
    if log.path.exists() and log.path.stat().st_size:
        raise ValueError(
            f"{log.path} holds a run already, and one log holds one run: give another folder as "
            "log=…, or move that one away."
        )
    return log


def _shares(loads: dict[str, Loads]) -> dict[str, Any]:
    """Loads as nested lists, rounded to what a picture can show."""
    return {
        "load": [[round(x, 6) for x in hard.tolist()] for hard, _ in loads.values()],
        "soft": [[round(x, 6) for x in soft.tolist()] for _, soft in loads.values()],
    }


def _header(model: nn.Module | None, balancing: Balancing, name: str | None) -> dict[str, Any]:
    first = next(iter(balancing.layers.values()))
    method = balancing.method
    watching = isinstance(method, NoBalancing)
    described: dict[str, Any] = {"num_experts": first.num_experts, "layers": list(balancing.layers)}
    if model is not None:
        size = sum(p.numel() for p in model.parameters())
        described |= {"architecture": type(model).__name__, "parameters": size}
    return {
        "name": name or ("run" if model is None else type(model).__name__),
        "method": "monitor" if watching else words_of(method),
        "method_repr": repr(method),
        "parts": describe(method),
        "seed": None,
        "versions": {"moebalance": __version__, "torch": torch.__version__},
        "model": described,
    }
