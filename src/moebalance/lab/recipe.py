"""A recipe: one TOML file that says everything about a run or a comparison.

name = "…"
[model]    architecture = "qwen3_moe", and any key of its configuration;
           or checkpoint = "folder", and the keys of its configuration to change
[data]     the text: `DataSpec`
[old_data] with a checkpoint: text the model knew already; evaluated, never trained on
[lora]     with a checkpoint: `LoraSpec`; without this table every weight is trained
[train]    the training: `TrainSpec`
[method]   name = "phi", and the options of the method      (moebalance train, finetune)
[compare]  methods, seeds, batching: `CompareSpec`           (moebalance compare)
[methods.phi] …                                              options by method
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails

from moebalance.files import MOST_DEEP
from moebalance.words.suggest import instead_of

FINAL = "final"
"""Name of the folder in a run's folder that holds the model it ended with."""

Batching = Literal["mixed", "one-domain", "shift"]


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("give at least one")
    if len(set(values)) < len(values):
        raise ValueError("give each one once")
    return values


def _attention_or_names(value: object) -> object:
    listed = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    if value != "attention" and not (listed and value):
        raise ValueError('give "attention", or a list of names such as ["q_proj", "v_proj"]')
    return value


_MOST_DEEP = MOST_DEEP // 2  # a run log holds the recipe, and what was made of it
_MOST = 10**9  # the order of so many sequences takes 8 GB
_Count = Annotated[int, Field(strict=True, ge=1, le=_MOST)]
_CountOrNone = Annotated[int, Field(strict=True, ge=0, le=_MOST)]
_Bytes = Annotated[int, Field(strict=True, ge=1, lt=2**63)]
_Number = Annotated[float, Field(strict=True, ge=0)]
_Names = Annotated[tuple[str, ...], AfterValidator(_each_once)]
_CONFIG = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CONFIG)
class DataSpec:
    """The text of a recipe.

    Args:
        source: `"python"`, or a path; see `text/corpus.py`.
        tokenizer: `"bytes"`, `"bpe"`, or `"checkpoint"` for the tokeniser of the model to
            fine-tune.
        vocab_size: ids of the `bpe` tokeniser in all; `bytes` always has 257.
        seq_len: S, tokens in a sequence.
        validation: part of each domain's bytes to hold out, in (0, 0.5].
        split_seed: another seed holds out other documents.
        domains: domains to use, in this order; None uses all.
        column: column of a data set with text, or with conversations if the tokeniser of a
            checkpoint has a chat template.
        domain_column: column with the domain of each row; None makes one domain of the data set.
        extensions: file endings to read in a folder; None reads every text file.
        max_bytes_per_domain: most bytes to read of each domain; None reads all.

    >>> DataSpec(tokenizer="bpe", vocab_size=512, seq_len=64).validation
    0.1
    """

    source: str = "python"
    tokenizer: Literal["bytes", "bpe", "checkpoint"] = "bytes"
    vocab_size: StrictInt = 512
    seq_len: Annotated[int, Field(strict=True, ge=2, le=_MOST)] = 128
    validation: Annotated[float, Field(strict=True, gt=0, le=0.5)] = 0.1
    split_seed: StrictInt = 0
    domains: _Names | None = None
    column: str = "text"
    domain_column: str | None = None
    extensions: _Names | None = None
    max_bytes_per_domain: _Bytes | None = None


@dataclass(frozen=True, config=_CONFIG)
class TrainSpec:
    """The training of a recipe.

    Args:
        steps: optimizer steps.
        batch_size: sequences in a micro-batch.
        accumulation: micro-batches in a step.
        learning_rate: the highest; AdamW with β = (0.9, 0.95).
        warmup: part of the steps in which the learning rate rises.
        schedule: a Transformers scheduler.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients are clipped at this norm; 0 clips nothing.
        batching: `"mixed"` or `"one-domain"` micro-batches; or `"shift"`, mixed ones of half of the
            domains first and of the other half from half-way on.
        eval_sequences: held-out sequences in an evaluation, and as many of the training split; the
            same for every run.
        eval_every: steps between evaluations; 0 evaluates once, at the end.
        snapshot_every: steps between load snapshots in the log.
        gradient_ratio: log how much of the routers' gradient is balancing, at some cost.
        save_every: steps between checkpoints; 0 saves none.
        bf16: compute in bfloat16; weights and router state stay in float32.
        gradient_checkpointing: compute activations twice instead of keeping them.
        sharded: split weights, gradients and optimizer state over the ranks (FSDP2), and save
            checkpoints with which any number of ranks can go on.
    """

    steps: _Count = 500
    batch_size: _Count = 8
    accumulation: _Count = 1
    learning_rate: Annotated[float, Field(strict=True, gt=0)] = 3e-3
    warmup: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.05
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: _Number = 0.1
    max_grad_norm: _Number = 1.0
    batching: Batching = "mixed"
    eval_sequences: _Count = 512
    eval_every: _CountOrNone = 0
    snapshot_every: _Count = 25
    gradient_ratio: StrictBool = False
    save_every: _CountOrNone = 0
    bf16: StrictBool = False
    gradient_checkpointing: StrictBool = False
    sharded: StrictBool = False


@dataclass(frozen=True, config=_CONFIG)
class LoraSpec:
    """The low-rank updates (LoRA) of a fine-tuning recipe.

    Args:
        r: rank of the updates.
        alpha: the updates are scaled by alpha / r.
        dropout: dropout before the updates, in [0, 1).
        target_modules: `"attention"`, every linear layer of every attention; or a list of names as
            PEFT takes them.
        train_router: train every router, in full rank. False freezes the routers; then only methods
            that work at selection, such as loss-free, can balance.
    """

    r: _Count = 16
    alpha: _Number = 32.0
    dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    target_modules: Annotated[
        Literal["attention"] | tuple[str, ...], BeforeValidator(_attention_or_names)
    ] = "attention"
    train_router: StrictBool = True


@dataclass(frozen=True, config=_CONFIG)
class CompareSpec:
    """The comparison of a recipe: every method × seed × batching is one run.

    Args:
        methods: words such as `"phi"` or `"phi+loss-free"`.
        seeds: each fixes fresh weights and the data order, alike for all methods.
        batching: kinds of micro-batch to run under.
        save_models: keep the model of every run in its folder `final`.
    """

    methods: _Names = ("none", "switch", "loss-free", "phi", "phi+loss-free(scale='nats')")
    seeds: Annotated[tuple[StrictInt, ...], AfterValidator(_each_once)] = (0, 1)
    batching: Annotated[tuple[Batching, ...], AfterValidator(_each_once)] = ("mixed",)
    save_models: StrictBool = False


@dataclass(frozen=True, config=_CONFIG)
class Recipe:
    """A whole recipe; see the text of this module."""

    name: str
    model: Mapping[str, Any]
    data: DataSpec = field(default_factory=DataSpec)
    train: TrainSpec = field(default_factory=TrainSpec)
    compare: CompareSpec = field(default_factory=CompareSpec)
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "phi"})
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    old_data: DataSpec | None = None
    lora: LoraSpec | None = None

    @property
    def checkpoint(self) -> str | None:
        """The folder that a fine-tuning recipe starts from; None for training from scratch."""
        return self.model.get("checkpoint")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for problem in _contradictions(self):
            raise ValueError(problem)
        return self

    @classmethod
    def parse(cls, table: Mapping[str, Any], *, source: str) -> Self:
        """Check a table read from TOML and make the recipe.

        Raises:
            ValueError: unknown or missing keys, values that cannot work; says where each is.
        """
        if (depth := _depth(table)) > _MOST_DEEP:
            raise ValueError(
                f"{source}: tables and lists are nested {depth} deep, and at most {_MOST_DEEP} fit "
                "in a run log."
            )
        named = {"name": Path(source).stem, **table}
        try:
            return TypeAdapter(cls).validate_python(_with_fine_tuning_defaults(named))
        except ValidationError as error:
            problems = (f"{source}: {_in_words(e)}" for e in error.errors(include_url=False))
            raise ValueError("\n".join(problems)) from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a recipe file.

        Raises:
            FileNotFoundError, ValueError: no such file, not TOML, or not a recipe.
        """
        if not path.is_file():
            raise FileNotFoundError(f"No recipe at {path}: give the path of a .toml file.")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors sign
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}.") from error
        except RecursionError:
            raise ValueError(f"{path} is nested too deep, at most {_MOST_DEEP} tables.") from None
        return cls.parse(table, source=str(path))

    def changed(self, section: str, **values: Any) -> Self:
        """The recipe with other values in a section; None leaves a value as it is.

        Raises:
            ValueError: a value that cannot work, in the words of `parse`.
        """
        given = {key: value for key, value in values.items() if value is not None}
        table = self.as_dict()
        return self.parse({**table, section: {**table[section], **given}}, source=self.name)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain tables, for the run header."""
        return asdict(self)


def _depth(table: Mapping[str, Any]) -> int:
    """How many tables and lists stand within each other, counted one level at a time."""
    depth = 0
    level: list[Iterable[Any]] = [table.values()]
    while level:
        inside = [value for values in level for value in values]
        tables = [value.values() for value in inside if isinstance(value, Mapping)]
        depth, level = depth + 1, [*tables, *(v for v in inside if isinstance(v, list | tuple))]
    return depth


def _contradictions(recipe: Recipe) -> Iterator[str]:
    """What two keys of a recipe say against each other."""
    if "name" not in recipe.method:
        yield '[method] needs name, for example "phi".'
    train = recipe.train
    if (sequences := train.steps * train.accumulation * train.batch_size) > _MOST:
        yield (
            f"[train] steps={train.steps} × accumulation={train.accumulation} × batch_size="
            f"{train.batch_size} are {sequences:,} sequences, and at most {_MOST:,} can be put in "
            "order: lower one of them."
        )
    if "checkpoint" not in recipe.model:
        yield from _lacks_a_checkpoint(recipe)
    elif "architecture" in recipe.model:
        yield (
            "[model] has both architecture (train from scratch) and checkpoint (fine-tune): give "
            "one of them."
        )
    elif not isinstance(recipe.checkpoint, str):
        yield "[model] checkpoint must be the path of a folder."
    for key in _SHARED_BY_TEXTS if recipe.old_data else ():
        old, new = getattr(recipe.old_data, key), getattr(recipe.data, key)
        if old != new:
            yield (
                f"[old_data] {key}={old!r} differs from [data]'s {new!r}: leave it out, it is the "
                "same for both."
            )


def _lacks_a_checkpoint(recipe: Recipe) -> Iterator[str]:
    if "architecture" not in recipe.model:
        yield (
            '[model] needs architecture, for example "qwen3_moe" or "mixtral", to train from '
            "scratch, or checkpoint, the path of a folder, to fine-tune."
        )
    for section in ("old_data", "lora"):
        if getattr(recipe, section) is not None:
            yield f"[{section}] is for fine-tuning: give [model] checkpoint, or leave it out."
    if recipe.data.tokenizer == "checkpoint":
        yield '[data] tokenizer="checkpoint" needs [model] checkpoint.'


# The losses of two texts can be compared only if these are one.
_SHARED_BY_TEXTS = ("tokenizer", "vocab_size", "seq_len")
# A step that teaches fresh weights would wipe out trained ones.
_LEARNING_RATE, _LORA_LEARNING_RATE = 2e-5, 2e-4


def _with_fine_tuning_defaults(table: dict[str, Any]) -> dict[str, Any]:
    model = table.setdefault("model", {})
    if not isinstance(model, dict) or "checkpoint" not in model:
        return table
    rate = _LEARNING_RATE if table.get("lora") is None else _LORA_LEARNING_RATE
    table = _with_defaults(table, "train", {"learning_rate": rate})
    table = _with_defaults(table, "data", {"tokenizer": "checkpoint"})
    if table.get("old_data") is None or not isinstance(table["data"], dict):
        return table
    shared = {key: table["data"][key] for key in _SHARED_BY_TEXTS if key in table["data"]}
    return _with_defaults(table, "old_data", shared)


def _with_defaults(
    table: dict[str, Any], section: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    given = table.get(section, {})
    return {**table, section: {**defaults, **given}} if isinstance(given, dict) else table


_SECTIONS: Mapping[str | int, type] = {
    "data": DataSpec,
    "old_data": DataSpec,
    "lora": LoraSpec,
    "train": TrainSpec,
    "compare": CompareSpec,
}
_TYPES = {
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list, even for one",
}


def _in_words(error: ErrorDetails) -> str:
    """One problem that pydantic found: where it is, what was given, what is possible."""
    kind, given, place = error["type"], error["input"], list(error["loc"])
    own = error.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        key, section = place.pop(), _SECTIONS.get(place[0], Recipe) if place else Recipe
        where = f"[{place[0]}]: " if place else ""
        known = [f.name for f in fields(section)]
        return f"{where}unknown key {key!r}.{instead_of(str(key), known)}"
    if not place:
        return str(own["error"])
    head = f"[{place[0]}] " if len(place) > 1 else ""
    key = ".".join(map(str, place[1:] or place))
    if kind in ("dataclass_type", "mapping_type", "dict_type"):
        return f"{head}{key}={given!r}: must be a table, [{'.'.join(map(str, place))}]."
    if kind == "literal_error":
        possible = own["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{head}{key}={given!r}.{instead_of(str(given), possible)}"
    if kind in _TYPES:
        return f"{head}{key}={given!r}: {_TYPES[kind]}, not {type(given).__name__}."
    words = str(own.get("error", error["msg"])).replace("Input should be", "must be")
    words = words.replace("greater than or equal to", "at least")
    return f"{head}{key}={given!r}: {words.replace('less than or equal to', 'at most')}."
