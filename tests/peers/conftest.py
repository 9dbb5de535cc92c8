"""Which release of Megatron-Core is tested, and a record of what ran for docs/frameworks.md.

MEGATRON=build/megatron/0.19.2    tests that release instead of the installed one
RECORD=build/frameworks           writes there what ran (frameworks.py makes the page of it)
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

if "MEGATRON" in os.environ:
    # First, and before anything imports the installed one. Processes that tests start inherit it.
    sys.path.insert(0, os.environ["MEGATRON"])

PACKAGES = {
    "megatron": "megatron-core",
    "torchtitan": "torchtitan",
    "lightning": "lightning",
    "olmo": "ai2-olmo-core",
    "autoep": "deepspeed",
    "deepspeed": "deepspeed",
}
_outcomes: dict[str, Counter[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a test once: by its call, or by what kept it from being called."""
    if report.when == "call" or (report.when == "setup" and not report.passed):
        file = report.nodeid.split("::")[0]
        _outcomes.setdefault(file, Counter())[report.outcome] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write one file for each framework that ran, if asked to."""
    if "RECORD" not in os.environ or hasattr(session.config, "workerinput"):
        return
    folder = Path(os.environ["RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    for package in dict.fromkeys(PACKAGES.values()):
        keys = tuple(f"test_{key}" for key, of in PACKAGES.items() if of == package)
        files = {f: dict(c) for f, c in _outcomes.items() if Path(f).name.startswith(keys)}
        if files:
            row = {"package": package, "release": _release(package), "torch": torch.__version__}
            name = f"{package} {row['release']}.json"
            (folder / name).write_text(json.dumps({**row, "files": files}, indent=1))


def _release(package: str) -> str:
    unpacked = package == "megatron-core" and "MEGATRON" in os.environ
    return Path(os.environ["MEGATRON"]).name if unpacked else version(package)
