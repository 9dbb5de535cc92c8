"""What the command line prints: tables, verdicts and progress, in a terminal of any width."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moebalance.runlog import LOG_NAME, Run, find_runs

if TYPE_CHECKING:
    from moebalance.lab.compare import Job
    from moebalance.lab.recipe import Recipe
    from moebalance.report import BeforeAfter

console, errors = Console(), Console(stderr=True)


def show(runs: list[Run], page: Path) -> None:
    """Print the tables and verdicts of runs, and write their report.

    Args:
        runs: one or more.
        page: the HTML file to write.
    """
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
        console.print(f"[bold]{escape(section.title)}[/]: {escape(section.verdict)}")
        if section.before_after is not None:
            _show_before_after(section.before_after)
    # Plain and alone on its line, so that it can be clicked or piped whatever the width.
    written = write_report(runs, page)
    console.print(f"Report: {escape(str(written.resolve()))}", soft_wrap=True, highlight=False)


def save_extras(
    runs: list[Run],
    *,
    figure: Path | None,
    figures: str | None,
    to: Path,
    markdown: Path | None,
    archive: Path | None,
) -> None:
    """Write what was asked for beside the page, and say where.

    Args:
        runs: one or more.
        figure: the SVG of loss against MaxVio.
        figures: formats of the figures for papers, with commas; they go to `to`.
        to: the folder of those figures.
        markdown: the tables and verdicts.
        archive: a folder for the logs without their step rows.
    """
    from moebalance.report import write_figure, write_figures, write_markdown
    from moebalance.runlog import archive as copy

    if figure is not None:
        console.print(f"Figure: {write_figure(runs, figure)}")
    if figures is not None:
        written = write_figures(runs, to, figures.split(","))
        console.print(f"Figures: {len(written)} files in {escape(str(to))}", soft_wrap=True)
    if markdown is not None:
        names = ", ".join(dict.fromkeys(str(run.header.get("name", "runs")) for run in runs))
        console.print(f"Markdown: {write_markdown(runs, markdown, f'Results: {names}')}")
    if archive is not None:
        for run in runs:
            copy(run, archive / run.batching / run.path.parent.name)
        console.print(f"Archived {len(runs)} logs in {archive}")


def show_diagnosis(target: str) -> bool:
    """Print what is wrong with runs or a model, and what to change; return whether it is an error.

    Args:
        target: a run log, a folder that holds some, or what the doctor of models takes.
    """
    if _holds_runs(Path(target)):
        from moebalance.report import diagnosis

        found = diagnosis.diagnose(find_runs(target))
        texts = [diagnosis.render(found, width=console.width)]
        severities = [str(each.severity) for each in found]
    else:
        from moebalance.lab import doctor

        model = doctor.diagnose(target)
        texts = [doctor.render(model, width=console.width)]
        severities = [str(finding.severity) for finding in model.findings]
    console.print("\n\n".join(texts), markup=False, highlight=False)
    return "error" in severities


def _holds_runs(path: Path) -> bool:
    """Whether this is a run log or a folder of them, and no model."""
    if path.is_file():
        return path.suffix == ".jsonl"
    model = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    return path.is_dir() and not model and next(path.rglob(LOG_NAME), None) is not None


def _show_before_after(found: "BeforeAfter") -> None:
    table = Table(title="before and after", title_justify="left")
    table.add_column("")
    # A narrow terminal gets the numbers that matter most rather than all of them cut short.
    shown = [i for i, m in enumerate(found.columns) if console.width >= 120 or "dead" not in m.key]
    for column in (found.columns[i] for i in shown):
        short = column.title.replace(" text:", "").replace(" experts", "")
        table.add_column(short, justify="right", no_wrap=True)
    for line in found.lines:
        cells = [(line.cells[i], found.columns[i].digits) for i in shown]
        texts = ("–" if e is None else e.text(digits).replace(" ", "") for e, digits in cells)
        table.add_row(escape(line.label), *texts)
    console.print(table)
    if found.verdict:
        console.print(escape(found.verdict))


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


def serve(folders: list[Path], port: int) -> None:
    """Serve the report of runs on this machine and say where, until Ctrl-C."""
    from moebalance.report.live import ReportServer

    with ReportServer(folders, port) as server:
        console.print(f"Live report: {server.url}", soft_wrap=True, highlight=False)
        console.print("It follows the runs and is seen from this machine only. Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def watch_runs(folders: list[Path], *, once: bool, every_s: float = 1.0) -> None:
    """Show runs in the terminal until all have ended, or Ctrl-C.

    Raises:
        FileNotFoundError: no run log is there.
    """
    from rich.live import Live

    from moebalance.report.live import readable_runs
    from moebalance.report.watch import view

    runs, problems = readable_runs(folders)
    if not runs and not problems:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no {LOG_NAME} under {where}; give a run folder, or one of them")
    if once:
        console.print(view(runs, problems, width=console.width))
        return
    with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            live.update(view(runs, problems, width=console.width), refresh=True)
            if runs and all(run.end is not None for run in runs):
                return
            time.sleep(every_s)
            runs, problems = readable_runs(folders)


def progress() -> Progress:
    """Bars that say how many steps are done and how long it took."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def run_jobs(recipe: "Recipe", jobs: "list[Job]", out: Path, workers: int | None) -> list[Run]:
    """Make the runs of a comparison under a bar for all, and one for each that is running."""
    from moebalance.lab.compare import compare

    console.print(
        f"[bold]{escape(recipe.name)}[/]: {len(jobs)} runs of {recipe.train.steps} steps, "
        f"{len(recipe.compare.methods)} methods × {len(recipe.compare.seeds)} seeds × "
        f"{len(recipe.compare.batching)} kinds of micro-batch → {escape(str(out))}"
    )
    with progress() as bars:
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

        return compare(recipe, out, workers=workers, progress=tell)


def trackers(folder: Path, names: str | None) -> AbstractContextManager[None]:
    """Send the runs under a folder to trackers, named with commas, while the block runs."""
    if names is None:
        return nullcontext()
    from moebalance.lab.trackers import following as sending

    return sending(folder, names.split(","))


@contextmanager
def following(log: Path, steps: int, label: str) -> Iterator[None]:
    """Show how far a run in this process is, from its log."""
    from moebalance.lab.compare import last_step

    with progress() as bars:
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
