"""A recipe: one TOML file that says everything about a run or a comparison.

name = "…"
[model]    architecture = "qwen3_moe", and any key of that architecture's configuration
[data]     see `data.DataSpec`
[train]    see `TrainSpec`
[method]   name = "phi", and the method's options           (moebalance train)
[compare]  methods, seeds, batching                          (moebalance compare)
[methods.phi] …                                              options by method
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from moebalance.experiments.batches import BATCHINGS
from moebalance.experiments.corpus import did_you_mean
from moebalance.experiments.data import DataSpec


@dataclass(frozen=True)
class TrainSpec:
    """The training part of a recipe.

    Args:
        steps: optimizer steps.
        batch_size: sequences in a micro-batch.
        accumulation: micro-batches in a step.
        learning_rate: peak; AdamW with β = (0.9, 0.95).
        warmup: share of the steps with rising learning rate.
        schedule: a Transformers scheduler, `"cosine"` or `"linear"` or `"constant_with_warmup"`.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped at this norm; 0 for not.
        batching: `"mixed"` or `"one-domain"` micro-batches.
        eval_sequences: held-out sequences in an evaluation, the same for every run.
        eval_every: steps between evaluations; 0 for one at the end.
        snapshot_every: steps between load snapshots in the log.
        save_every: steps between checkpoints; 0 for none.
    """

    steps: int = 500
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 3e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    batching: str = "mixed"
    eval_sequences: int = 512
    eval_every: int = 0
    snapshot_every: int = 25
    save_every: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "eval_sequences", "snapshot_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("eval_every", "save_every", "weight_decay", "max_grad_norm", "warmup"):
            _at_least(name, getattr(self, name), 0)
        _at_least("learning_rate", self.learning_rate, 0)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate!r}: must be greater than 0.")
        if self.warmup > 1:
            raise ValueError(f"warmup={self.warmup!r}: a share of the steps, at most 1.")
        _one_of("batching", self.batching, BATCHINGS)
        _one_of("schedule", self.schedule, ("cosine", "linear", "constant_with_warmup"))


@dataclass(frozen=True)
class CompareSpec:
    """The comparison part of a recipe: every method × seed × batching is one run.

    Args:
        methods: words such as `"phi"` or `"phi+loss-free"`.
        seeds: each seeds the initial weights and the data order, alike for all methods.
        batching: kinds of micro-batch to run under.
    """

    methods: tuple[str, ...] = ("none", "switch", "loss-free", "phi", "phi+loss-free")
    seeds: tuple[int, ...] = (0, 1)
    batching: tuple[str, ...] = ("mixed",)

    def __post_init__(self) -> None:
        for name in ("methods", "seeds", "batching"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value))
            if not value:
                raise ValueError(f"[compare] {name} is empty: give at least one.")
        for batching in self.batching:
            _one_of("batching", batching, BATCHINGS)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; see the module's text."""

    name: str
    model: Mapping[str, Any]
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    compare: CompareSpec = field(default_factory=CompareSpec)
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "phi"})
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def parse(cls, table: Mapping[str, Any], *, source: str) -> Self:
        """Check a table read from TOML and make the recipe.

        Raises:
            ValueError: an unknown or missing key, a value that cannot work; says where.
        """
        _known(table, [f.name for f in fields(cls)], source)
        for section in ("model", "data", "train", "compare", "method", "methods"):
            if not isinstance(table.get(section, {}), dict):
                raise ValueError(f"{source}: {section} must be a table, [{section}].")
        for word, options in table.get("methods", {}).items():
            if not isinstance(options, dict):
                raise ValueError(f"{source}: methods.{word} must be a table, [methods.{word}].")
        model = table.get("model", {})
        if "architecture" not in model:
            raise ValueError(
                f'{source}: [model] needs architecture, for example "qwen3_moe" or "mixtral".'
            )
        parts: dict[str, Any] = {}
        for section, kind in (("data", DataSpec), ("train", TrainSpec), ("compare", CompareSpec)):
            values = table.get(section, {})
            _known(values, [f.name for f in fields(kind)], f"{source}: [{section}]")
            try:
                parts[section] = kind(**values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}: [{section}] {error}") from error
        method = table.get("method", {"name": "phi"})
        if "name" not in method:
            raise ValueError(f'{source}: [method] needs name, for example "phi".')
        return cls(
            name=str(table.get("name", Path(source).stem)),
            model=model,
            method=method,
            methods=table.get("methods", {}),
            **parts,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a recipe file.

        Raises:
            FileNotFoundError, ValueError: no such file, not TOML, or not a recipe.
        """
        if not path.is_file():
            raise FileNotFoundError(f"No recipe at {path}: give the path of a .toml file.")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}.") from error
        return cls.parse(table, source=str(path))

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain tables, for the run header."""
        return asdict(self)


def _known(table: Mapping[str, Any], possible: list[str], where: str) -> None:
    for key in table:
        if key not in possible:
            raise ValueError(
                f"{where}: unknown key {key!r}.{did_you_mean(key, possible)} "
                f"Possible: {', '.join(possible)}."
            )


def _at_least(name: str, value: object, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}: must be a number, not {type(value).__name__}.")
    if not value >= least:
        raise ValueError(f"{name}={value!r}: must be at least {least}.")


def _one_of(name: str, value: str, possible: tuple[str, ...]) -> None:
    if value not in possible:
        raise ValueError(
            f"{name}={value!r}.{did_you_mean(value, possible)} Possible: {', '.join(possible)}."
        )
