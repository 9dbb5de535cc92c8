"""Starting a program the short way, past Triton's lookup, against Triton's own way.

Nothing runs: between Triton's launcher and the device stands a driver that keeps what it is told
(no_gpu.c). What reaches it must be the same either way, to the last byte of every argument.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from kernel_processes import caller, process

PROGRAMS = {
    "programs.choose",
    "programs.pull_back",
    "attached_programs.count",
    "attached_programs.pull",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    nvidia = pytest.importorskip("triton.backends.nvidia")
    folder = tmp_path_factory.mktemp("driver")
    headers = Path(nvidia.__path__[0]) / "include"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1",
         str(Path(__file__).with_name("no_gpu.c")), "-o", str(folder / "libcuda.so.1")],
        check=True,
    )  # fmt: skip
    return folder / "libcuda.so.1"


@pytest.fixture(scope="module")
def elsewhere(library):
    """Call a function where Triton compiles for compute capability 9.0 and starts nothing."""
    folder = str(library.parent)
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": f"{folder}/cache"}
    with process({**environment, "TRITON_LIBCUDA_PATH": folder}) as pool:
        yield caller(pool)


def test_a_program_started_again_reaches_the_driver_as_triton_would_send_it(library, elsewhere):
    starts = elsewhere(all_starts, str(library))
    assert {start.program for start in starts} == PROGRAMS
    for start in starts:
        assert start.first == start.again == start.tritons, start.program
        assert start.again.arguments == start.given, start.program
        assert start.again.grid == (start.blocks, 1, 1)


def test_triton_is_asked_once_for_each_dtype_and_alignment(library, elsewhere):
    starts = elsewhere(all_starts, str(library))
    asked = [s for s in starts if s.asked_first]
    assert not any(s.asked_again for s in starts)
    # Two dtypes and two alignments; tokens are 16, 33 and 1, which Triton would tell apart.
    assert len(asked) == 4 * len(PROGRAMS)
    assert len({s.again.function for s in starts}) == len(asked)
    assert len(starts) == 3 * 4 * len(PROGRAMS)


class Launch(NamedTuple):
    """What the driver was told."""

    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    function: int
    arguments: tuple[int, ...]


class Start(NamedTuple):
    """One program started three times: for the first time or not, again, and by Triton."""

    program: str
    blocks: int
    first: Launch
    again: Launch
    tritons: Launch
    given: tuple[int, ...]
    asked_first: bool
    asked_again: bool


def all_starts(library: str) -> list[Start]:
    from moebalance.kernels import attached, launch, router

    driver, seen = pretend(library), list[Start]()
    start, function = launch.Program.start, launch._function

    def watched(program, grid, tensors, numbers):
        given = tensors + numbers
        driver.expect_arguments(len(given))

        def sent(by):
            with mock.patch.object(launch, "_function", mock.Mock(wraps=function)) as asked:
                by()
            return last(driver, given), asked.called

        first, asked_first = sent(lambda: start(program, grid, tensors, numbers))
        again, asked_again = sent(lambda: start(program, grid, tensors, numbers))
        tritons, _ = sent(lambda: function(program.name)[(grid,)](*given, **program.options))
        words = tuple(word(value) for value in given)
        asked = asked_first, asked_again
        seen.append(Start(program.name, grid, first, again, tritons, words, *asked))

    for known in (router._choosing, router._pulling_back, attached._counting, attached._pulling):
        known.cache_clear()
    with mock.patch.object(launch.Program, "start", watched):
        for dtype in (torch.float32, torch.bfloat16):
            for aligned in (True, False):
                for tokens in (16, 33, 1):
                    every_program(tokens, dtype, aligned)
    return seen


def every_program(tokens: int, dtype: torch.dtype, aligned: bool) -> None:
    from moebalance import PhiBalancing, Softmax, kernels
    from moebalance.kernels import Settlement, choose, count, pull, pull_back

    experts, top_k, gate, method = 24, 4, Softmax(), PhiBalancing()
    skipped = 0 if aligned else 1
    memory = torch.randn(tokens * experts + skipped).to(dtype)
    logits = memory[skipped:].view(tokens, experts)
    found = choose(logits, gate, top_k, normalize=True)
    price = kernels.mean_price(method, method.init(experts))
    assert price is not None
    running = torch.zeros_like(found.packed)
    charge = Settlement(price, found.packed, running, torch.zeros(2), torch.ones(()))
    upstream = torch.randn(tokens, top_k).to(dtype)
    pull_back(
        upstream, logits, found.experts, found.normaliser, gate, normalize=True, charge=charge
    )
    count(logits, found.experts, gate)
    pull(logits, gate, charge)


@cache
def pretend(library: str):
    """Give Triton a device, whose driver is the library; nothing else here sees one."""
    driver = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver as active

    class Driver(CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 7
            self.set_current_device = lambda device: None

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    active.set_active(Driver())
    driver.last_launch.restype = ctypes.POINTER(Kept)
    return driver


class Kept(ctypes.Structure):
    """`struct launch` of no_gpu.c."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("arguments", ctypes.c_ulonglong * 24),
    ]


def last(driver, given) -> Launch:
    kept = driver.last_launch().contents
    words = zip(kept.arguments, given, strict=False)
    # A number takes four of the eight bytes that were kept.
    arguments = [w if isinstance(v, torch.Tensor) else w & 0xFFFFFFFF for w, v in words]
    return Launch(
        tuple(kept.grid), kept.threads, kept.shared, kept.stream, kept.function, tuple(arguments)
    )


def word(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return struct.unpack("<I", struct.pack("<f" if isinstance(value, float) else "<i", value))[0]
