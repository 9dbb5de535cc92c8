"""Tables, verdicts and diagnoses for a terminal of any width."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from moebalance.cleaning import for_terminal
from moebalance.lab.archive import archive_runs
from moebalance.runlog import LOG_NAME, Run, find_runs

if TYPE_CHECKING:
    from moebalance.lab.traces import Missing
    from moebalance.report import BeforeAfter

REPORT = "report.html"


class Terminal(Console):
    """A console whose text is plain: no markup, and no character that does anything.

    All that this package prints goes through one, so a name in a log or a model cannot act.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Clean what is printed; what moves bars is rich's own, and is marked as such."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=for_terminal(segment.text))


console, errors = Terminal(), Terminal(stderr=True)


def say(text: str) -> None:
    """Print a line as it is, never wrapped: it can be clicked, copied or piped at any width."""
    console.print(text, soft_wrap=True, highlight=False)


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "run"), counted(3, "run")
    ('1 run', '3 runs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def show(runs: list[Run], page: Path) -> None:
    """Print the tables and verdicts of runs, and write their report.

    Args:
        runs: one or more.
        page: the HTML file to write.
    """
    from moebalance.report import summarise, summary_rows, write_report

    rows = summary_rows(runs)
    # A narrow terminal gets the first columns in full rather than all of them cut short.
    columns = _COLUMNS if console.width >= 150 else _COLUMNS[:7]
    sections = summarise(runs)
    for section in sections:
        here = [row for row in rows if row["batching"] == section.batching]
        told = [c for c in columns if any(row.get(c[1]) is not None for row in here)]
        cells = [[_cell(row, key, digits) for _, key, digits in told] for row in here]
        _print_table(section.title, *_fitting([c[0] for c in told], cells))
    for section in sections:
        words = console.render_str(f"{section.title}: {section.verdict}")
        words.stylize("bold", 0, len(section.title))
        console.print(words)
        if section.before_after is not None:
            _show_before_after(section.before_after)
    say(f"Report: {write_report(runs, page).resolve()}")


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


def _fitting(
    titles: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """As many columns as leave room for every word of the names: cut, two settings look alike."""
    name = max(len(word) for row in [titles, *rows] for word in row[0].split())
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    kept = len(titles)
    while kept > 2 and name + sum(widths[1:kept]) + 3 * kept + 1 > console.width:
        kept -= 1
    return titles[:kept], [row[:kept] for row in rows]


def _cell(row: Mapping[str, Any], key: str, digits: int) -> str:
    value, sd = row.get(key), row.get(f"{key}_sd")
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:.{digits}f}" + (f"±{sd:.{digits}f}" if sd is not None else "")


def _show_before_after(found: "BeforeAfter") -> None:
    # A narrow terminal gets the numbers that matter most rather than all of them cut short.
    shown = [i for i, m in enumerate(found.columns) if console.width >= 120 or "dead" not in m.key]
    titles = (found.columns[i].title for i in shown)
    short = [title.replace(" text:", "").replace(" experts", "") for title in titles]
    rows = []
    for line in found.lines:
        cells = [(line.cells[i], found.columns[i].digits) for i in shown]
        texts = ("–" if e is None else e.text(digits).replace(" ", "") for e, digits in cells)
        rows.append([line.label, *texts])
    _print_table("before and after", ["", *short], rows)
    if found.verdict:
        console.print(found.verdict)


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table of names on the left, which may wrap, and numbers on the right, which may not."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        justify, overflow = ("right", "ellipsis") if i else ("left", "fold")
        table.add_column(column, justify=justify, no_wrap=i > 0, overflow=overflow)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def save_extras(
    runs: list[Run],
    *,
    figure: Path | None,
    figures: str | None,
    to: Path,
    markdown: Path | None,
    archive: Path | None,
) -> None:
    """Write what was asked for next to the page, and say where.

    Args:
        runs: one or more.
        figure: SVG file for loss against MaxVio.
        figures: formats of the figures for papers, with commas.
        to: folder of those figures.
        markdown: file for the tables and verdicts.
        archive: folder for the logs without their step rows.
    """
    from moebalance.report import write_figure, write_figures, write_markdown

    if figure is not None:
        say(f"Figure: {write_figure(runs, figure)}")
    if figures is not None:
        written = write_figures(runs, to, figures.split(","))
        say(f"Figures: {counted(len(written), 'file')} in {to}")
    if markdown is not None:
        names = ", ".join(dict.fromkeys(str(run.header.get("name", "runs")) for run in runs))
        say(f"Markdown: {write_markdown(runs, markdown, f'Results: {names}')}")
    if archive is not None:
        copies = archive_runs(runs, archive)
        say(f"Archived {counted(len(copies), 'log')} in {archive}")


def runs_or_traces(path: Path, missing: "Missing | None" = None) -> list[Run]:
    """The runs of a log, a folder of them, or a trace that another tool wrote.

    Args:
        path: of it.
        missing: what a trace does not say; None for nothing known.
    """
    from moebalance.lab.traces import Missing, find_traces, is_trace

    if not is_trace(path):
        return find_runs(path)
    found = find_traces(path, missing or Missing())
    for note in found.notes:
        say(note)
    return found.runs


def show_diagnosis(target: str, missing: "Missing | None" = None) -> bool:
    """Print what is wrong with runs or a model, and what to change; return whether it is an error.

    Args:
        target: a run log, a folder of runs, a trace, or a model as the doctor of models takes it.
        missing: what a trace does not say.
    """
    if _holds_runs(Path(target)):
        from moebalance.report import diagnosis

        found = diagnosis.diagnose(runs_or_traces(Path(target), missing))
        texts = [diagnosis.render(found, width=console.width)]
        severities = [str(each.severity) for each in found]
    else:
        from moebalance.lab import doctor

        model = doctor.diagnose(target)
        texts = [doctor.render(model, width=console.width)]
        severities = [str(finding.severity) for finding in model.findings]
    console.print("\n\n".join(texts), highlight=False)
    return "error" in severities


def _holds_runs(path: Path) -> bool:
    """Whether this is a run log, a folder of them or a trace, and no model."""
    from moebalance.lab.traces import is_trace

    if path.is_file():
        return path.suffix == ".jsonl" or is_trace(path)
    if is_trace(path):
        return True
    model = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    return path.is_dir() and not model and next(path.rglob(LOG_NAME), None) is not None


def serve(folders: list[Path], port: int) -> None:
    """Serve the report of runs on this machine and say where, until Ctrl-C."""
    from moebalance.report.live import ReportServer

    with ReportServer(folders, port) as server:
        say(f"Live report: {server.url}")
        say("It follows the runs and is seen from this machine only. Ctrl-C ends it.")
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def watch_runs(folders: list[Path], *, once: bool, every_s: float = 1.0) -> bool:
    """Show runs in the terminal until all have ended, or Ctrl-C.

    Returns:
        Whether every log could be read, in the end.

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
    if once or not runs:  # there is nothing to wait for
        console.print(view(runs, problems, width=console.width))
        return not problems
    with Live(console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
        while True:
            live.update(view(runs, problems, width=console.width), refresh=True)
            if runs and all(run.end is not None for run in runs):
                break
            time.sleep(every_s)
            runs, problems = readable_runs(folders)
    return not problems


def trackers(
    folder: Path, names: str | None, show: str | None = None
) -> AbstractContextManager[None]:
    """Send the runs under a folder to trackers, named with commas, while the block runs."""
    if names is None:
        return nullcontext()
    from moebalance.lab.trackers import following
    from moebalance.metrics.shown import Show

    return following(
        folder, names.split(","), show=Show() if show is None else Show.of(show.split(","))
    )
