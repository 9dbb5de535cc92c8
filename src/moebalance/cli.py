"""The command line: words people type, one call for each.

moebalance demo                    compare φ-balancing with its rivals on bundled text
moebalance train recipe.toml       train one model with one method
moebalance compare recipe.toml     methods × seeds under equal compute
moebalance report runs/…           run logs → one offline HTML file
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as missing:
    sys.exit(f"The command line needs {missing.name}: pip install 'moebalance[train]'.")

from moebalance.runlog import LOG_NAME, Run, find_runs, read_run

if TYPE_CHECKING:
    from moebalance.experiments.compare import Job
    from moebalance.experiments.recipe import Recipe

app = typer.Typer(
    help="Load balancing for Mixture-of-Experts training: φ-balancing and its rivals.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)

DEMO = "demo.toml"
REPORT = "report.html"

OutOption = Annotated[Path | None, typer.Option("--out", help="Folder for runs and report.")]
MethodsOption = Annotated[
    str | None,
    typer.Option(help="Comma-separated, e.g. 'none,phi(strength=0.01),phi+loss-free'."),
]
SeedsOption = Annotated[int | None, typer.Option(min=1, help="Number of seeds: 0, 1, ….")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimizer steps in a run.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes at a time.")]


@app.command()
def demo(
    out: OutOption = None,
    methods: MethodsOption = None,
    seeds: SeedsOption = None,
    steps: StepsOption = None,
    workers: WorkersOption = None,
) -> None:
    """Compare φ-balancing with its rivals on text that every Python ships. CPU, minutes."""
    with _plain_errors():
        from moebalance.experiments.recipe import Recipe

        recipe = Recipe.parse(_bundled(DEMO), source=DEMO)
        _compare(recipe, out or Path("runs/demo"), methods, seeds, steps, workers)


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    out: OutOption = None,
    methods: MethodsOption = None,
    seeds: SeedsOption = None,
    steps: StepsOption = None,
    workers: WorkersOption = None,
) -> None:
    """Run methods × seeds under equal compute and data order, and report."""
    with _plain_errors():
        from moebalance.experiments.recipe import Recipe

        read = Recipe.read(recipe)
        _compare(read, out or Path("runs") / read.name, methods, seeds, steps, workers)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    out: OutOption = None,
    method: Annotated[
        str | None, typer.Option(help="Instead of the recipe's, e.g. 'phi(strength=0.01)'.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights and data order.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")
    ] = False,
) -> None:
    """Train one Mixture-of-Experts model with one method, log every step, and report."""
    with _plain_errors():
        from moebalance.experiments.methods import build_method
        from moebalance.experiments.recipe import Recipe
        from moebalance.experiments.train import train_run

        read = Recipe.read(recipe)
        options = dict(read.method)
        name = str(options.pop("name"))
        if method is None:
            read = replace(read, methods={**read.methods, name: options})
        name = method or name
        build_method(name, read.methods)  # refuse a bad word before anything is loaded
        folder = out or Path("runs") / read.name / f"seed{seed}"
        with _following(folder / LOG_NAME, read.train.steps, name):
            train_run(
                read,
                method=name,
                seed=seed,
                batching=read.train.batching,
                folder=folder,
                resume=resume,
                cache_dir=folder / "cache",
            )
        _show([read_run(folder / LOG_NAME)], folder / REPORT)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")],
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file to write.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Also write loss against MaxVio as SVG.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write verdicts and tables as Markdown.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Also copy the logs, without their step rows, to here.")
    ] = None,
) -> None:
    """Turn run logs into a table and one offline HTML file."""
    with _plain_errors():
        found = [run for folder in runs for run in find_runs(folder)]
        first = runs[0] if runs[0].is_dir() else runs[0].parent
        _show(found, out or first / REPORT)
        names = ", ".join(dict.fromkeys(str(run.header.get("name", "runs")) for run in found))
        if figure is not None:
            from moebalance.report import write_figure

            console.print(f"Figure: {write_figure(found, figure)}")
        if markdown is not None:
            from moebalance.report import write_markdown

            console.print(f"Markdown: {write_markdown(found, markdown, f'Results: {names}')}")
        if archive is not None:
            from moebalance.runlog import archive as copy

            for run in found:
                copy(run, archive / run.batching / run.path.parent.name)
            console.print(f"Archived {len(found)} logs in {archive}")


def main() -> None:
    """Run the command line."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_path=False, show_time=False)],
    )
    app()


def _compare(
    recipe: "Recipe",
    out: Path,
    methods: str | None,
    seeds: int | None,
    steps: int | None,
    workers: int | None,
) -> None:
    from moebalance.experiments.compare import compare as run_all
    from moebalance.experiments.compare import plan
    from moebalance.experiments.methods import split_outside_brackets

    if methods is not None:
        words = tuple(split_outside_brackets(methods, ","))
        recipe = replace(recipe, compare=replace(recipe.compare, methods=words))
    if seeds is not None:
        recipe = replace(recipe, compare=replace(recipe.compare, seeds=tuple(range(seeds))))
    if steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    jobs = plan(recipe, out)
    console.print(
        f"[bold]{escape(recipe.name)}[/]: {len(jobs)} runs of {recipe.train.steps} steps, "
        f"{len(recipe.compare.methods)} methods × {len(recipe.compare.seeds)} seeds × "
        f"{len(recipe.compare.batching)} kinds of micro-batch → {escape(str(out))}"
    )
    try:
        with _progress() as bars:
            overall = bars.add_task("all runs", total=len(jobs) * recipe.train.steps)
            rows: dict[Job, Any] = {}

            def tell(running: Mapping["Job", int], states: Mapping["Job", str]) -> None:
                ended = sum(s not in ("waiting", "running") for s in states.values())
                done = ended * recipe.train.steps + sum(running.values())
                bars.update(overall, completed=done)
                for job, step in running.items():
                    if job not in rows:
                        rows[job] = bars.add_task(job.label, total=recipe.train.steps)
                    bars.update(rows[job], completed=step)
                for job in set(rows) - set(running):
                    bars.remove_task(rows.pop(job))

            found = run_all(recipe, out, workers=workers, progress=tell)
    except (KeyboardInterrupt, RuntimeError):
        if list(out.rglob(LOG_NAME)):
            console.print("Stopped early; this is what there is. The same command goes on.")
            _show(find_runs(out), out / REPORT)
        raise
    _show(found, out / REPORT)


def _show(runs: list[Run], page: Path) -> None:
    from moebalance.report import summarise, summary_rows, write_report

    for batching in {row["batching"]: None for row in summary_rows(runs)}:
        table = Table(title=f"{batching} micro-batches", title_justify="left")
        # A narrow terminal gets the first columns in full rather than all of them cut short.
        columns = _COLUMNS if console.width >= 150 else _COLUMNS[:7]
        for title, _, _ in columns:
            left = title == "method"
            table.add_column(title, justify="left" if left else "right", no_wrap=not left)
        for row in summary_rows(runs):
            if row["batching"] == batching:
                table.add_row(*(_cell(row, key, digits) for _, key, digits in columns))
        console.print(table)
    for section in summarise(runs):
        console.print(escape(section.verdict))
    # Plain and alone on its line, so that it can be clicked or piped whatever the width.
    written = write_report(runs, page)
    console.print(f"Report: {escape(str(written.resolve()))}", soft_wrap=True, highlight=False)


_COLUMNS = (
    ("method", "label", 0),
    ("val loss", "val_loss", 3),
    ("MaxVio", "maxvio", 2),
    ("gap", "soft_hard_gap", 2),
    ("dead", "dead_experts", 0),
    ("MI", "mi", 2),
    ("time", "step_time_ratio", 2),
    ("MaxVio batch", "maxvio_batch", 2),
    ("soft MaxVio", "soft_maxvio", 2),
    ("Gini", "gini", 2),
    ("entropy", "entropy", 2),
    ("purity", "purity", 2),
)


def _cell(row: Mapping[str, Any], key: str, digits: int) -> str:
    value, sd = row.get(key), row.get(f"{key}_sd")
    if value is None:
        return "–"
    if isinstance(value, str):
        return escape(value)
    return f"{value:.{digits}f}" + (f"±{sd:.{digits}f}" if sd is not None else "")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


@contextmanager
def _following(log: Path, steps: int, label: str) -> Iterator[None]:
    """Show how far a run in this process is, from its log."""
    import threading

    from moebalance.experiments.compare import last_step

    with _progress() as bars:
        task = bars.add_task(label, total=steps)
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.5):
                bars.update(task, completed=last_step(log))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            bars.update(task, completed=last_step(log))


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Say what went wrong in one paragraph; a traceback is for our own mistakes."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("Interrupted. Logs and checkpoints are whole; run the command again.")
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        errors.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


def _bundled(name: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((files("moebalance") / "recipes" / name).read_text(encoding="utf-8"))
