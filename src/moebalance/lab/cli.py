"""The command line: words people type, one call for each.

moebalance demo                    compare φ-balancing with its rivals on bundled text
moebalance train recipe.toml       train one model with one method
moebalance finetune recipe.toml    the same from a checkpoint's weights
moebalance compare recipe.toml     methods × seeds under equal compute
moebalance report runs/…           run logs → one offline HTML file, or a live page (--follow)
moebalance watch runs/…            the same runs in the terminal
moebalance track runs/… --to …     run logs → TensorBoard, W&B or trackio
moebalance doctor MODEL            what balances a model, what can, and what will leave with it
moebalance doctor runs/…           what is wrong with runs, and what to change
moebalance bench                   what every method costs on this machine, side by side
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.logging import RichHandler
    from rich.markup import escape
except ModuleNotFoundError as missing:
    sys.exit(f"The command line needs {missing.name}: pip install 'moebalance[train]'.")

from moebalance.lab.console import (
    console,
    errors,
    following,
    run_jobs,
    save_extras,
    serve,
    show,
    show_diagnosis,
    trackers,
    watch_runs,
)
from moebalance.runlog import LOG_NAME, find_runs, read_run

if TYPE_CHECKING:
    from moebalance.lab.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DEMO = "demo.toml"
REPORT = "report.html"

OutOption = Annotated[Path | None, typer.Option("--out", help="Folder for runs and report.")]
MethodsOption = Annotated[
    str | None,
    typer.Option(help="Comma-separated, e.g. 'none,phi(strength=0.01),phi+loss-free'."),
]
SeedsOption = Annotated[int | None, typer.Option(min=1, help="Number of seeds: 0, 1, ….")]
MethodOption = Annotated[
    str | None, typer.Option(help="Instead of the recipe's, e.g. 'phi(strength=0.01)'.")
]
SeedOption = Annotated[int, typer.Option(help="Of initial weights and data order.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")]
TrackOption = Annotated[
    str | None, typer.Option(help="Also send rows to 'tensorboard,wandb,trackio' or some.")
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimizer steps in a run.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Processes at a time.")]


def _say_version(asked: bool) -> None:
    if asked:
        from moebalance import __version__

        console.print(f"moebalance {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def begin(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Load balancing for Mixture-of-Experts training: φ-balancing and its rivals."""


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
        from moebalance.lab.recipe import Recipe

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
    track: TrackOption = None,
) -> None:
    """Run methods × seeds under equal compute and data order, and report."""
    with _plain_errors():
        from moebalance.lab.recipe import Recipe

        read = Recipe.read(recipe)
        _compare(read, out or Path("runs") / read.name, methods, seeds, steps, workers, track)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file.")],
    out: OutOption = None,
    method: MethodOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    track: TrackOption = None,
) -> None:
    """Train one Mixture-of-Experts model with one method, log every step, save it and report."""
    with _plain_errors():
        from moebalance.lab.recipe import Recipe

        read = Recipe.read(recipe)
        if read.checkpoint is not None:
            raise ValueError(
                f"{recipe} starts from a checkpoint: run `moebalance finetune {recipe}`."
            )
        _run_one(read, out, method, seed, resume, track)


@app.command()
def finetune(
    recipe: Annotated[Path, typer.Argument(help="A recipe file with [model] checkpoint.")],
    out: OutOption = None,
    method: MethodOption = None,
    seed: Annotated[int, typer.Option(help="Of the data order, and of LoRA's start.")] = 0,
    resume: ResumeOption = False,
    track: TrackOption = None,
) -> None:
    """Fine-tune one checkpoint with one method, whole or by LoRA; report before and after.

    For methods × seeds on one recipe there is `compare`.
    """
    with _plain_errors():
        from moebalance.lab.recipe import Recipe

        read = Recipe.read(recipe)
        if read.checkpoint is None:
            raise ValueError(
                f"{recipe} names no [model] checkpoint to start from: add one, or run "
                f"`moebalance train {recipe}`."
            )
        _run_one(read, out, method, seed, resume, track)


@app.command()
def doctor(
    target: Annotated[
        str, typer.Argument(help="A model type, config.json or checkpoint; or runs, or a log.")
    ],
) -> None:
    """Say what is wrong with a model's routers and biases, or with runs, and what to change.

    Loads no weights. Ends with exit code 1 if a finding is an error.
    """
    with _plain_errors():
        failed = show_diagnosis(target)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")],
    out: Annotated[Path | None, typer.Option("--out", help="The HTML file to write.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Also loss against MaxVio, as SVG.")] = None,
    figures: Annotated[
        str | None, typer.Option(help="Also draw figures for papers: 'pdf,svg,png' or some.")
    ] = None,
    figures_dir: Annotated[Path | None, typer.Option(help="Their folder.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write verdicts and tables as Markdown.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Also copy the logs, without their step rows, to here.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Serve a page that follows training, write nothing.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="For --follow; 0: a free one.")] = 0,
) -> None:
    """Turn run logs into a table and one offline HTML file."""
    with _plain_errors():
        if follow:
            serve(runs, port)
            return
        found = [run for folder in runs for run in find_runs(folder)]
        first = runs[0] if runs[0].is_dir() else runs[0].parent
        show(found, out or first / REPORT)
        save_extras(
            found,
            figure=figure,
            figures=figures,
            to=figures_dir or first / "figures",
            markdown=markdown,
            archive=archive,
        )


@app.command()
def track(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")],
    to: Annotated[str, typer.Option(help="'tensorboard,wandb,trackio', or some of them.")],
    folder: Annotated[Path | None, typer.Option(help="Where trackers write.")] = None,
) -> None:
    """Send finished runs to experiment trackers."""
    with _plain_errors():
        from moebalance.lab.trackers import track as send

        count = sum(len(send(path, to.split(","), folder=folder)) for path in runs)
        console.print(f"Sent {count} runs to {escape(to)}.")


@app.command()
def bench(
    methods: Annotated[
        str, typer.Option(help="Comma-separated, e.g. 'phi,phi(peek=False),switch'.")
    ] = "phi,switch,loss-free,none",
    tokens: Annotated[str, typer.Option(help="Tokens in a batch; several with commas.")] = "8192",
    sizes: Annotated[
        str, typer.Option(help="Experts and experts per token, e.g. '8:2,64:8'.")
    ] = "8:2,64:8,256:8",
    rules: Annotated[
        str, typer.Option(help="How scores become weights: softmax, normalised, sigmoid.")
    ] = "softmax,sigmoid",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Of the processor.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Each variant runs once a round.")] = 31,
    step: Annotated[bool, typer.Option("--step", help="Also a whole training step.")] = False,
    scale: Annotated[
        bool, typer.Option("--scale", help="Also how it grows to 64 layers of 512 experts.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write NAME.json, NAME.md and NAME.svg.")
    ] = None,
) -> None:
    """Measure what every method costs on this machine, beside a bare router and its rivals."""
    with _plain_errors():
        from moebalance.lab.bench.command import run

        run(
            methods=methods,
            tokens=tokens,
            sizes=sizes,
            rules=rules,
            device=device,
            threads=threads,
            rounds=rounds,
            step=step,
            scale=scale,
            out=out,
        )


@app.command()
def watch(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders of them.")],
    once: Annotated[bool, typer.Option("--once", help="Show it once and leave.")] = False,
) -> None:
    """Follow runs in the terminal, until they end."""
    with _plain_errors():
        watch_runs(runs, once=once)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_path=False, show_time=False)],
    )
    app()


def _run_one(
    recipe: "Recipe", out: Path | None, method: str | None, seed: int, resume: bool, to: str | None
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from moebalance.lab.compare import run_name
    from moebalance.lab.recipe import FINAL
    from moebalance.lab.train import train_run
    from moebalance.words.methods import build_method

    options = dict(recipe.method)
    name = str(options.pop("name"))
    if method is None:
        recipe = replace(recipe, methods={**recipe.methods, name: options})
    name = method or name
    build_method(name, recipe.methods)  # refuse a bad word before anything is loaded
    own = f"seed{seed}" if method is None else run_name(method, seed)
    folder = out or Path("runs") / recipe.name / own
    disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar is enough
    first = int(os.environ.get("RANK", 0)) == 0  # started by torchrun: the first process reports
    sent = trackers(folder, to if first else None)
    with sent, following(folder / LOG_NAME, recipe.train.steps, name):
        train_run(
            recipe,
            method=name,
            seed=seed,
            batching=recipe.train.batching,
            folder=folder,
            resume=resume,
            save_model=True,
            cache_dir=folder / "cache",
        )
    if not first:
        return
    console.print(f"Model: {escape(str(folder / FINAL))}", soft_wrap=True, highlight=False)
    show([read_run(folder / LOG_NAME)], folder / REPORT)


def _compare(
    recipe: "Recipe",
    out: Path,
    methods: str | None,
    seeds: int | None,
    steps: int | None,
    workers: int | None,
    track: str | None = None,
) -> None:
    from moebalance.lab.compare import plan
    from moebalance.words.methods import split_outside_brackets

    if methods is not None:
        words = tuple(split_outside_brackets(methods, ","))
        recipe = replace(recipe, compare=replace(recipe.compare, methods=words))
    if seeds is not None:
        recipe = replace(recipe, compare=replace(recipe.compare, seeds=tuple(range(seeds))))
    if steps is not None:
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))
    jobs = plan(recipe, out)
    try:
        with trackers(out, track):
            found = run_jobs(recipe, jobs, out, workers)
    except (KeyboardInterrupt, RuntimeError):
        if list(out.rglob(LOG_NAME)):
            console.print("Stopped early; this is what there is. The same command goes on.")
            show(find_runs(out), out / REPORT)
        raise
    show(found, out / REPORT)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Say what went wrong in one paragraph; a traceback is for our own mistakes."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("Interrupted. Logs and checkpoints are whole; run the command again.")
        raise typer.Exit(130) from None
    except (
        ValueError,
        TypeError,
        OSError,
        RuntimeError,
        FloatingPointError,
        ImportError,
    ) as error:
        errors.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from None


def _bundled(name: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((files("moebalance") / "recipes" / name).read_text(encoding="utf-8"))
