"""How the sums of many programs become one row, within the launch that forms them.

    partials   program ─┐
               program ─┼─ the last of 32 adds up their rows ─┐
               …        ─┘                                     ├─ the last of all ─→ packed
               program ──── …                                 ─┘

Which program is the last differs from run to run; the order of addition does not. So sums are the
same in every bit. A program that is done takes a ticket from a counter. All its stores come before,
and all loads of the one with the last ticket come after: `ticket` says why.
"""
# mypy: ignore-errors
# Triton compiles these functions as its own language, in which arguments carry no types.

import triton
import triton.language as tl

MEMBERS = tl.constexpr(32)
"""Programs of a group; `tiling.MEMBERS` is the same number."""


@triton.jit
def join(
    partials,
    packed,
    tickets,
    num_sums: tl.constexpr,
    lines: tl.constexpr,
    columns: tl.constexpr,
):
    """Add up the rows of `partials` into `packed`. Every program calls it, its own row written.

    partials: (programs + groups, num_sums); the rows of the groups come last.
    tickets: (1 + groups,) int32, all 0 before the launch and after it.
    lines, columns: of the numbers that are loaded at a time.
    """
    programs = tl.num_programs(0)
    group, groups = tl.program_id(0) // MEMBERS, tl.cdiv(programs, MEMBERS)
    first = group * MEMBERS
    members = tl.minimum(programs - first, MEMBERS)
    middle = partials + programs.to(tl.int64) * num_sums
    if ticket(tickets + 1 + group) == members - 1:
        tl.store(tickets + 1 + group, 0)
        rows = partials + first.to(tl.int64) * num_sums
        _add(rows, members, middle + group.to(tl.int64) * num_sums, num_sums, lines, columns)
        if ticket(tickets) == groups - 1:
            tl.store(tickets, 0)
            _add(middle, groups, packed, num_sums, lines, columns)


@triton.jit
def ticket(counter):
    """How many programs have been here before.

    Barrier: all threads' stores come before the atomic of the one thread that takes the ticket.
    Release: they are then seen by whoever takes a later ticket of this counter.
    Acquire: and a barrier, with which Triton hands the ticket to all threads, precede their loads.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def _add(rows, count, total, num_sums: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr):
    """Add up `count` rows in their order; past the first cache, which may hold what was there."""
    for begin in range(0, num_sums, columns):
        at = begin + tl.arange(0, columns)[None, :]
        sums = tl.zeros((lines, columns), tl.float32)
        for start in range(0, count, lines):
            row = start + tl.arange(0, lines)[:, None]
            there = (row < count) & (at < num_sums)
            sums += tl.load(rows + row * num_sums + at, there, other=0.0, cache_modifier=".cg")
        at = begin + tl.arange(0, columns)
        tl.store(total + at, tl.sum(sums, axis=0), mask=at < num_sums)
