"""A process in which Triton sees another environment, and a way to call functions there."""

from __future__ import annotations

import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch


def process(environment):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    start = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, start, initializer=prepare, initargs=(environment,))


def prepare(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)


def caller(pool):
    """Tensors travel as bytes: shared memory would need as many files as tensors."""

    def call(function, *args: Any, **kwargs: Any):
        answer = pool.submit(work, as_bytes((function, args, kwargs))).result()
        return torch.load(io.BytesIO(answer), weights_only=False)

    return call


def work(call: bytes) -> bytes:
    function, args, kwargs = torch.load(io.BytesIO(call), weights_only=False)
    return as_bytes(function(*args, **kwargs))


def as_bytes(thing) -> bytes:
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()
