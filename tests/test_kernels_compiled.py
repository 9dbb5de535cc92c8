"""The fused router, compiled for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from kernel_processes import caller, process
from moebalance import GroupLimit
from moebalance.kernels.tiling import next_power, tile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("experts", "top_k", "limit"),
    [(8, 2, None), (64, 8, None), (256, 8, None), (256, 8, GroupLimit(8, 4)), (2304, 8, None)],
)
def test_registers_of_an_h100_hold_what_a_program_holds(experts, top_k, limit, dtype, compiler):
    spilled = compiler(spills, experts, top_k, limit, dtype)
    # The widest router spills a little, and is faster than with more warps that would not.
    widest = experts == 2304 and dtype == torch.float32
    assert spilled.pop("choose") <= (400 if widest else 0)
    assert spilled == {"pull_back": 0, "count": 0, "pull": 0}


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """Call a function where Triton compiles."""
    cache = str(tmp_path_factory.mktemp("triton"))
    with process({"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}) as pool:
        yield caller(pool)


@pytest.mark.parametrize("experts", [8, 256, 2304])
def test_registers_of_an_h100_hold_every_vector_of_a_price(experts, compiler):
    assert compiler(spills_of_the_price, experts) == 0


def spills_of_the_price(experts):
    from moebalance.kernels import price_program

    program = price_program.charge
    flags = {"entropy": True, "hard": False, "peek": True, "in_tokens": True}
    flags |= {"has_multiplier": True}
    sizes = {"num_experts": experts, "width": 1 << (experts - 1).bit_length(), **flags}
    floats = {"strength": "fp32", "rate": "fp32"}
    names = program.arg_names
    signature = {n: "constexpr" if n in sizes else floats.get(n, "*fp32") for n in names}
    return compiled_stack(program, signature, sizes, warps=4)


def spills(experts, top_k, limit, dtype):
    """Bytes of stack that each program takes on compute capability 9.0, by its name."""
    from moebalance.kernels import attached_programs, programs

    logits = torch.empty(4, experts, dtype=dtype)
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys(["logits", "weights", "upstream", "gradient"], element)
    types |= dict.fromkeys(["price", "charge", "normaliser", "partials"], "*fp32")
    types |= {"experts": "*i64", "mask": "*u8", "rows": "i32", "zero": "i32"}
    flags = {"sigmoid": limit is not None, "normalize": True, "has_mask": True}
    flags |= {"top_k": top_k, "slots": next_power(top_k), "slab": 1024}
    flags |= {"bins": next_power(experts + 1)}
    flags |= {"has_price": limit is not None, "has_charge": True}
    flags |= {"kept": limit.top_groups if limit else 0, "best": limit.best if limit else 1}
    found = {}
    for program in (
        programs.choose,
        programs.pull_back,
        attached_programs.count,
        attached_programs.pull,
    ):
        sums = program in (programs.choose, attached_programs.count)
        narrowed = limit if program is programs.choose else None
        tiling = tile(logits, narrowed, sums=sums)
        names = program.arg_names
        sizes = {n: v for n, v in (tiling.sizes | flags).items() if n in names}
        signature = {n: types.get(n, "constexpr") for n in names}
        found[program.__name__] = compiled_stack(program, signature, sizes, warps=tiling.warps)
    return found


def compiled_stack(program, signature, sizes, *, warps):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = enumerate(signature.values())
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in kinds if "*" in kind}
    compiled = triton.compile(
        ASTSource(program, signature, sizes, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    )
    return stack(compiled.asm["cubin"])


def stack(cubin: bytes) -> int:
    from triton import knobs

    file = Path(knobs.cache.dir) / "program.cubin"
    file.write_bytes(cubin)
    dump = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(re.search(r"STACK:(\d+)", dump.stdout + dump.stderr)[1])
