"""The fused router, compiled for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from kernel_processes import caller, process
from moebalance import GroupLimit
from moebalance.kernels.tiling import added, next_power, tile


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


@pytest.mark.parametrize("program", ["choose", "count"])
def test_a_ticket_lies_between_all_that_is_stored_before_and_all_that_is_loaded_after(
    program, compiler
):
    """Stores, a barrier, an atomic with release and acquire, a barrier, loads: twice."""
    seen = compiler(memory_operations, program)
    tickets = [i for i, operation in enumerate(seen) if operation.startswith("atom")]
    assert len(tickets) == 2
    for ticket in tickets:
        assert seen[ticket] == "atom.global.gpu.acq_rel.add.u32"
        before = seen[:ticket][::-1]
        stored = next(i for i, operation in enumerate(before) if operation.startswith("st.global"))
        assert "bar.sync" in before[:stored]
        after = seen[ticket + 1 :]
        loaded = next(i for i, operation in enumerate(after) if operation.startswith("ld.global"))
        assert "bar.sync" in after[:loaded]
        assert after[loaded].startswith("ld.global.cg")  # not from a cache of before the ticket


def memory_operations(program):
    asm = dict(compiled(64, 8, None, torch.float32))[program]
    return re.findall(r"(?:atom|ld|st)\.global[\w.:]*|bar\.sync", asm["ptx"])


def spills(experts, top_k, limit, dtype):
    """Bytes of stack that each program takes on compute capability 9.0, by its name."""
    return {name: stack(asm["cubin"]) for name, asm in compiled(experts, top_k, limit, dtype)}


def compiled(experts, top_k, limit, dtype):
    """Each program with all that it can be asked for, by its name."""
    from moebalance.kernels import attached_programs, programs

    logits = torch.empty(4, experts, dtype=dtype)
    element = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    types = dict.fromkeys(["logits", "weights", "upstream", "gradient"], element)
    types |= dict.fromkeys(["price", "charge", "normaliser", "partials", "packed"], "*fp32")
    types |= dict.fromkeys(["running", "last_step", "scale", "mean", "weight"], "*fp32")
    types |= {"multiplier": "*fp32", "strength": "fp32", "rate": "fp32", "tickets": "*i32"}
    types |= {"experts": "*i64", "mask": "*u8", "rows": "i32", "zero": "i32"}
    flags = {"sigmoid": limit is not None, "normalize": True, "has_mask": True}
    flags |= {"top_k": top_k, "slots": next_power(top_k), "slab": 1024}
    flags |= {"bins": next_power(experts + 1)}
    # The widest router spills a little more under a price: 440 bytes.
    priced = bool(limit) or (dtype == torch.float32 and experts < 2304)
    flags |= {"has_price": priced, "in_nats": bool(limit)}
    flags |= {"has_charge": True, "counts": True, "forms": True}
    flags |= {"entropy": True, "hard": False, "peek": True, "in_tokens": True}
    flags |= {"has_multiplier": True}
    flags |= {"kept": limit.top_groups if limit else 0, "best": limit.best if limit else 1}
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
        flags |= added(experts, 2048 if program is programs.choose else 1024)
        sizes = {n: v for n, v in (tiling.sizes._asdict() | flags).items() if n in names}
        signature = {n: types.get(n, "constexpr") for n in names}
        yield program.__name__, assembly(program, signature, sizes, warps=tiling.warps)


def assembly(program, signature, sizes, *, warps):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = enumerate(signature.values())
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in kinds if "*" in kind}
    return triton.compile(
        ASTSource(program, signature, sizes, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": True},
    ).asm


def stack(cubin: bytes) -> int:
    from triton import knobs

    file = Path(knobs.cache.dir) / "program.cubin"
    file.write_bytes(cubin)
    dump = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(re.search(r"STACK:(\d+)", dump.stdout + dump.stderr)[1])
