"""Let a Hugging Face Trainer drive a monitor."""

from collections.abc import Iterable
from typing import Any, Protocol

from moebalance.core.handle import Balancing
from moebalance.integrations.huggingface.reporting import SHOWN, Reporting


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
        show: what its reporters show next to the metrics, as for `BalanceCallback`.

    Raises:
        ValueError: a word of `show` is unknown.
    """

    def __init__(
        self, monitor: Recorder, *, prefix: str = "moe/", show: Iterable[str] = SHOWN
    ) -> None:
        super().__init__(prefix, show)
        self.monitor = monitor

    @property
    def balancing(self) -> Balancing:
        """The handle under the monitor."""
        return self.monitor.balancing

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step; where the trainer is about to log, its loss is waited for."""
        self.monitor.balancing.step()
        if not control.should_log:
            self.monitor.record()

    def measured(self, logs: dict[str, Any]) -> dict[str, float]:
        """The metrics of the step; the entry's loss goes to the run log with them."""
        return self.monitor.record(loss=float(logs["loss"]))

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
