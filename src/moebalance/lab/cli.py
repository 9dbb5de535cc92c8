"""The command line: words people type, one call for each.

moebalance demo                    compare φ-balancing with its rivals on bundled text
moebalance train recipe.toml       train one model with one method
moebalance finetune recipe.toml    the same from the weights of a checkpoint
moebalance compare recipe.toml     methods × seeds under equal compute
moebalance report runs/…           run logs → one offline HTML file, or a live page (--follow)
moebalance report trace.jsonl      the same for what Megatron, rollouts or Transformers wrote
moebalance watch runs/…            the same runs in the terminal
moebalance track runs/… --to …     run logs → TensorBoard, W&B or trackio
moebalance doctor MODEL            what balances a model, what can, and what its checkpoint keeps
moebalance doctor runs/…           what is wrong with runs, and what to change
moebalance bench                   what every method costs on this machine, side by side
"""

import logging
import sys
from collections.abc import Callable
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ParamSpec

try:
    import typer
    from rich.logging import RichHandler
    from rich.text import Text
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError as missing:
    sys.exit(f"The command line needs {missing.name}: in the clone, pip install '.[train]'.")

from moebalance.lab.console import (
    REPORT,
    console,
    counted,
    errors,
    runs_or_traces,
    save_extras,
    say,
    serve,
    show,
    show_diagnosis,
    watch_runs,
)

DEMO = "demo.toml"
_P = ParamSpec("_P")


class _PlainHelp:
    """Leaves out the value of --help, which takes none."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option


class _Command(_PlainHelp, TyperCommand):
    def format_help(self, ctx: Any, formatter: Any) -> None:
        for argument in self.params:
            if argument.param_type_name == "argument":
                # Its name says what to give; Typer would add the Python type, <list[Path]>.
                argument.display_type_rich = lambda ctx: ""  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


class _Group(_PlainHelp, TyperGroup):
    pass


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def command(function: Callable[_P, None]) -> Callable[_P, None]:
    """Make a function a command that says what went wrong in words.

    A traceback is for mistakes of this library.
    """

    @wraps(function)
    def in_words(*args: _P.args, **options: _P.kwargs) -> None:
        try:
            function(*args, **options)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except typer.Exit:  # a RuntimeError, and the command's own word
            raise
        except (
            ValueError,
            TypeError,
            OSError,
            RuntimeError,
            FloatingPointError,
            ImportError,
        ) as error:
            words = Text.assemble(("Error:", "red"), f" {error}")
            errors.print(words, soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None

    return app.command(cls=_Command)(in_words)


def _flag(name: str, help: str, **options: Any) -> Any:
    return typer.Option(name, metavar="", help=help, **options)


def _option(metavar: str, help: str, **options: Any) -> Any:
    return typer.Option(metavar=metavar, help=help, **options)


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
RunFolders = Annotated[
    list[Path], typer.Argument(metavar="RUNS", help="Run folders, or folders of them.")
]
Out = Annotated[Path | None, _option("FOLDER", "Where the runs and the report go.")]
Methods = Annotated[
    str | None, _option("METHODS", "With commas, e.g. 'none,phi(strength=0.01),phi+loss-free'.")
]
Seeds = Annotated[int | None, _option("NUMBER", "How many seeds: 0, 1, ….", min=1)]
Steps = Annotated[int | None, _option("NUMBER", "Optimizer steps of a run.", min=1)]
Workers = Annotated[int | None, _option("NUMBER", "Runs at a time.", min=1)]
MethodWord = Annotated[
    str | None, _option("METHOD", "Instead of the recipe's, e.g. 'phi(strength=0.01)'.")
]
Seed = Annotated[int, _option("NUMBER", "Fixes initial weights (or LoRA's) and data order.")]
Resume = Annotated[bool, _flag("--resume", "Go on from the last checkpoint.")]
Track = Annotated[
    str | None, _option("TRACKERS", "Also send rows to 'tensorboard,wandb,trackio' or some.")
]
ShowToo = Annotated[
    str | None,
    _option("WHAT", "What trackers show too: 'layers,percentiles,images,tables', some, or 'none'."),
]
Experts = Annotated[
    int | None, _option("NUMBER", "Experts of a layer, if a trace does not say.", min=2)
]
TopK = Annotated[
    int | None, _option("NUMBER", "Experts of a token, if a trace does not say.", min=1)
]
Layers = Annotated[int | None, _option("NUMBER", "MoE layers, if a trace does not say.", min=1)]


def _say_version(asked: bool) -> None:
    if asked:
        from moebalance import __version__

        console.print(f"moebalance {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def begin(
    version: Annotated[
        bool, _flag("--version", "Show the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Load balancing for Mixture-of-Experts training: φ-balancing and its rivals."""


@command
def demo(
    out: Out = None,
    methods: Methods = None,
    seeds: Seeds = None,
    steps: Steps = None,
    workers: Workers = None,
) -> None:
    """Compare φ-balancing with its rivals on text that every Python ships. CPU, minutes."""
    import tomllib

    from moebalance.lab.jobs import compare_all
    from moebalance.lab.recipe import Recipe

    text = (files("moebalance.lab") / "recipes" / DEMO).read_text(encoding="utf-8")
    recipe = Recipe.parse(tomllib.loads(text), source=DEMO)
    compare_all(recipe, out, methods=methods, seeds=seeds, steps=steps, workers=workers)


@command
def compare(
    recipe: RecipeFile,
    out: Out = None,
    methods: Methods = None,
    seeds: Seeds = None,
    steps: Steps = None,
    workers: Workers = None,
    track: Track = None,
    show: ShowToo = None,
) -> None:
    """Run methods × seeds under equal compute and data order, and report."""
    from moebalance.lab.jobs import compare_all
    from moebalance.lab.recipe import Recipe

    given = {"methods": methods, "seeds": seeds, "steps": steps, "workers": workers}
    compare_all(Recipe.read(recipe), out, track=track, show_too=show, **given)  # type: ignore[arg-type]


@command
def train(
    recipe: RecipeFile,
    out: Out = None,
    method: MethodWord = None,
    seed: Seed = 0,
    resume: Resume = False,
    track: Track = None,
    show: ShowToo = None,
) -> None:
    """Train one Mixture-of-Experts model with one method, log every step, save it and report."""
    _run_one(recipe, out, method, seed, resume, track, show, fine_tunes=False)


@command
def finetune(
    recipe: RecipeFile,
    out: Out = None,
    method: MethodWord = None,
    seed: Seed = 0,
    resume: Resume = False,
    track: Track = None,
    show: ShowToo = None,
) -> None:
    """Fine-tune one checkpoint with one method, whole or by LoRA; report before and after.

    RECIPE has a [model] checkpoint. For methods × seeds there is `compare`.
    """
    _run_one(recipe, out, method, seed, resume, track, show, fine_tunes=True)


def _run_one(recipe: Path, *options: Any, fine_tunes: bool) -> None:
    from moebalance.lab.jobs import run_one
    from moebalance.lab.recipe import Recipe

    read = Recipe.read(recipe)
    if read.checkpoint is None and fine_tunes:
        raise ValueError(
            f"{recipe} names no [model] checkpoint to start from: add one, or run `moebalance "
            f"train {recipe}`."
        )
    if read.checkpoint is not None and not fine_tunes:
        raise ValueError(f"{recipe} starts from a checkpoint: run `moebalance finetune {recipe}`.")
    run_one(read, *options)


@command
def doctor(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A model type, config.json or checkpoint; or runs, a log, or a trace.",
        ),
    ],
    experts: Experts = None,
    top_k: TopK = None,
    layers: Layers = None,
) -> None:
    """Say what is wrong with a model's routers and biases, or with runs, and what to change.

    Loads no weights. Ends with exit code 1 if a finding is an error.
    """
    from moebalance.lab.traces import Missing

    if show_diagnosis(target, Missing(experts, top_k, layers)):
        raise typer.Exit(1)


@command
def report(
    runs: RunFolders,
    out: Annotated[Path | None, _option("FILE", "The HTML file to write.")] = None,
    figure: Annotated[Path | None, _option("FILE", "Also loss against MaxVio, as SVG.")] = None,
    figures: Annotated[
        str | None, _option("FORMATS", "Also figures for papers: 'pdf,svg,png' or some.")
    ] = None,
    figures_dir: Annotated[Path | None, _option("FOLDER", "Where those figures go.")] = None,
    markdown: Annotated[
        Path | None, _option("FILE", "Also write verdicts and tables as Markdown.")
    ] = None,
    archive: Annotated[
        Path | None, _option("FOLDER", "Also copy the logs, without their step rows, to here.")
    ] = None,
    follow: Annotated[
        bool, _flag("--follow", "Serve a page that follows training; write nothing.")
    ] = False,
    port: Annotated[
        int, _option("NUMBER", "Port for --follow; 0 for a free one.", min=0, max=65535)
    ] = 0,
    experts: Experts = None,
    top_k: TopK = None,
    layers: Layers = None,
) -> None:
    """Turn run logs, or traces of other tools, into a table and one offline HTML file."""
    if follow:
        serve(runs, port)
        return
    from moebalance.lab.traces import Missing

    missing = Missing(experts, top_k, layers)
    found = [run for folder in runs for run in runs_or_traces(folder, missing)]
    first = runs[0] if runs[0].is_dir() else runs[0].parent
    show(found, out or first / REPORT)
    to = figures_dir or first / "figures"
    save_extras(found, figure=figure, figures=figures, to=to, markdown=markdown, archive=archive)


@command
def track(
    runs: RunFolders,
    to: Annotated[str, _option("TRACKERS", "'tensorboard,wandb,trackio', or some of them.")],
    folder: Annotated[Path | None, _option("FOLDER", "Where trackers write.")] = None,
    show: ShowToo = None,
) -> None:
    """Send finished runs to experiment trackers."""
    from moebalance.lab.trackers import track as send
    from moebalance.metrics.shown import Show

    too = Show() if show is None else Show.of(show.split(","))
    count = sum(len(send(path, to.split(","), folder=folder, show=too)) for path in runs)
    say(f"Sent {counted(count, 'run')} to {to}.")


@command
def bench(
    methods: Annotated[
        str, _option("METHODS", "With commas, e.g. 'phi,phi(peek=False),switch'.")
    ] = "phi,switch,loss-free,none",
    tokens: Annotated[str, _option("NUMBERS", "Tokens in a batch; several with commas.")] = "8192",
    sizes: Annotated[
        str, _option("SIZES", "Experts and experts per token, e.g. '8:2,64:8'.")
    ] = "8:2,64:8,256:8",
    rules: Annotated[
        str, _option("RULES", "How scores become weights: softmax, normalised, sigmoid.")
    ] = "softmax,sigmoid",
    device: Annotated[str, _option("DEVICE", "cpu or cuda.")] = "cpu",
    threads: Annotated[int, _option("NUMBER", "Threads of the processor.", min=1)] = 1,
    rounds: Annotated[int, _option("NUMBER", "Each variant runs once a round.", min=2)] = 31,
    step: Annotated[bool, _flag("--step", "Also a whole training step.")] = False,
    scale: Annotated[
        bool, _flag("--scale", "Also how it grows to 64 layers of 512 experts.")
    ] = False,
    out: Annotated[Path | None, _option("NAME", "Write NAME.json, NAME.md and NAME.svg.")] = None,
) -> None:
    """Measure what every method costs on this machine, next to a bare router and its rivals."""
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


@command
def watch(
    runs: RunFolders,
    once: Annotated[bool, _flag("--once", "Show them once and leave.")] = False,
) -> None:
    """Follow runs in the terminal, until they end.

    Ends with exit code 1 if a log cannot be read.
    """
    if not watch_runs(runs, once=once):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors, show_path=False, show_time=False)],
    )
    app()
