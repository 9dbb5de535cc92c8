"""Let a Hugging Face Trainer drive a monitor."""

from typing import Any, Protocol

from moebalance.core.handle import Balancing
from moebalance.integrations.huggingface.reporting import Reporting


class Recorder(Protocol):
    """What this needs of a `moebalance.Monitor`."""

    balancing: Balancing

    def record(self, **scalars: float) -> dict[str, float]:
        """Log a step that was ended."""

    def evaluate(self, **scalars: float) -> dict[str, float]:
        """Log an evaluation."""


class MonitorCallback(Reporting):
    """Log what a monitor sees with a Hugging Face Trainer (or TRL's).

    Args:
        monitor: what `moebalance.monitor` returned.
        prefix: put before each metric's name in the trainer's logs.
    """

    def __init__(self, monitor: Recorder, *, prefix: str = "moe/") -> None:
        self.monitor, self.prefix = monitor, prefix

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step; where the trainer is about to log, its loss is waited for."""
        self.monitor.balancing.step()
        if not control.should_log:
            self.monitor.record()

    def complete(self, state: Any, logs: dict[str, Any]) -> None:
        """Add the metrics to a training log entry, and the entry's loss to the run log."""
        found = self.monitor.record(loss=float(logs["loss"]))
        logs.update({self.prefix + name: value for name, value in found.items()})

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log what the evaluation's forwards did."""
        loss = (metrics or {}).get("eval_loss")
        self.monitor.evaluate(**({} if loss is None else {"loss": loss}))
