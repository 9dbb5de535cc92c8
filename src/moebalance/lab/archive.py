"""Copies of run logs without their step rows, each in a folder of its own."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from moebalance.cleaning import for_path
from moebalance.runlog import Run, archive


def archive_runs(runs: Sequence[Run], to: Path) -> list[Path]:
    """Copy logs into a folder, each log once, and return where the copies lie.

    A copy is named after its kind of micro-batch and the folder of its log. Where that would give
    two logs one name, the folders above are put before it: `r1/seed0` and `r2/seed0`.
    """
    by_path = {run.path.resolve(): run for run in runs}
    copies = []
    for path, run in by_path.items():
        alike = [p for p, r in by_path.items() if r.batching == run.batching and p != path]
        copies.append(
            archive(run, to.joinpath(*map(for_path, [run.batching, *_name(path, alike)])))
        )
    return copies


def _name(path: Path, others: Sequence[Path]) -> tuple[str, ...]:
    """The shortest end of a path that no other path has."""
    taken = [list(_ends(other)) for other in others]
    ends = enumerate(_ends(path))
    return next(end for depth, end in ends if all(end not in t[depth : depth + 1] for t in taken))


def _ends(path: Path) -> Iterator[tuple[str, ...]]:
    """Longer and longer ends of the folder that a file lies in, then of the file itself."""
    folder = path.parent.parts
    yield from (folder[-depth:] for depth in range(1, len(folder) + 1))
    yield from (path.parts[-depth:] for depth in range(2, len(path.parts) + 1))
