"""How many inputs each fuzz test tries: a bounded number in `make test`, more in `make fuzz`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

LONGER = 10
"""How many times as many inputs `make fuzz` tries."""

FUZZ = "FUZZ" in os.environ


def fuzz(what: str, inputs: int) -> Callable[[Any], Any]:
    """A hypothesis test of so many inputs, and a row of docs/survives.md.

    Args:
        what: is tried, for the page.
        inputs: tried by `make test`, always the same ones; `make fuzz` tries others each time.
    """
    assert what
    return settings(
        max_examples=inputs * (LONGER if FUZZ else 1),
        derandomize=not FUZZ,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
