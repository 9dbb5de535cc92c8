"""A worker that outlives its interrupt; imports little, so that it starts at once."""

import time
from pathlib import Path

from moebalance.lab.workers import end_with_parent


def swallow(told: str) -> None:
    """A worker that says that it was interrupted, and goes on."""
    end_with_parent(grace=1.0)
    Path(told).write_text("running")
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            Path(told).write_text("interrupted")
