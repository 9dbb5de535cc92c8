"""A recipe: one TOML file that says everything about a run or a comparison.

name = "…"
[model]    architecture = "qwen3_moe", and any key of that architecture's configuration;
           or checkpoint = "folder", and any key of its configuration to change
[data]     see `data.DataSpec`
[old_data] with a checkpoint: text it knew already, evaluated and never trained on
[lora]     with a checkpoint: see `LoraSpec`; without the table every weight is trained
[train]    see `TrainSpec`
[method]   name = "phi", and the method's options           (moebalance train, finetune)
[compare]  methods, seeds, batching                          (moebalance compare)
[methods.phi] …                                              options by method
"""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from moebalance.lab.text.batches import BATCHINGS
from moebalance.lab.text.data import DataSpec
from moebalance.words.suggest import did_you_mean

if TYPE_CHECKING:
    from moebalance.methods import Method

FINAL = "final"
"""Name of the folder in a run's folder that holds the model it ended with."""


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
        batching: `"mixed"` or `"one-domain"` micro-batches, or `"shift"`: mixed ones of half of the
            domains, and from half-way on of the other half.
        eval_sequences: held-out sequences in an evaluation, the same for every run.
        eval_every: steps between evaluations; 0 for one at the end.
        snapshot_every: steps between load snapshots in the log.
        save_every: steps between checkpoints; 0 for none.
        bf16: compute in bfloat16, with weights and router state in float32.
        gradient_checkpointing: compute activations twice instead of keeping them.
        sharded: split weights, gradients and optimizer state over the ranks (FSDP2), and save
            checkpoints that any number of ranks can take up.
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
    bf16: bool = False
    gradient_checkpointing: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        for name in ("bf16", "gradient_checkpointing", "sharded"):
            _true_or_false(name, getattr(self, name))
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
class LoraSpec:
    """The LoRA part of a fine-tuning recipe: which layers get low-rank updates.

    Args:
        r: rank of the updates.
        alpha: they are scaled by alpha / r.
        dropout: before them.
        target_modules: `"attention"`, every linear layer of every attention; or a list of names as
            PEFT takes them.
        train_router: train the routers too, in full rank; False freezes them, and then only
            methods that work at selection can balance.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "attention"
    train_router: bool = True

    def __post_init__(self) -> None:
        _at_least("r", self.r, 1)
        _at_least("alpha", self.alpha, 0)
        _at_least("dropout", self.dropout, 0)
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout!r}: must be less than 1.")
        _true_or_false("train_router", self.train_router)
        targets = self.target_modules
        if isinstance(targets, str):
            if targets != "attention":
                raise ValueError(
                    f'target_modules={targets!r}: give "attention", or a list of names such as '
                    '["q_proj", "v_proj"].'
                )
            return
        if not targets or not all(isinstance(name, str) for name in targets):
            raise ValueError(f"target_modules={targets!r}: give a list of at least one name.")
        object.__setattr__(self, "target_modules", tuple(targets))  # TOML gives lists


@dataclass(frozen=True)
class CompareSpec:
    """The comparison part of a recipe: every method × seed × batching is one run.

    Args:
        methods: words such as `"phi"` or `"phi+loss-free"`.
        seeds: each seeds the initial weights and the data order, alike for all methods.
        batching: kinds of micro-batch to run under.
        save_models: keep every run's model in its `final/`.
    """

    methods: tuple[str, ...] = ("none", "switch", "loss-free", "phi", "phi+loss-free")
    seeds: tuple[int, ...] = (0, 1)
    batching: tuple[str, ...] = ("mixed",)
    save_models: bool = False

    def __post_init__(self) -> None:
        _true_or_false("save_models", self.save_models)
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
    old_data: DataSpec | None = None
    lora: LoraSpec | None = None

    @property
    def checkpoint(self) -> str | None:
        """The folder that a fine-tuning recipe starts from; None for training from scratch."""
        return self.model.get("checkpoint")

    @classmethod
    def parse(cls, table: Mapping[str, Any], *, source: str) -> Self:
        """Check a table read from TOML and make the recipe.

        Raises:
            ValueError: an unknown or missing key, a value that cannot work; says where.
        """
        table = {key: value for key, value in table.items() if value is not None}
        _known(table, [f.name for f in fields(cls)], source)
        for section in (*_SECTIONS, "model", "method", "methods"):
            if not isinstance(table.get(section, {}), dict):
                raise ValueError(f"{source}: {section} must be a table, [{section}].")
        for word, options in table.get("methods", {}).items():
            if not isinstance(options, dict):
                raise ValueError(f"{source}: methods.{word} must be a table, [methods.{word}].")
        method = table.get("method", {"name": "phi"})
        if "name" not in method:
            raise ValueError(f'{source}: [method] needs name, for example "phi".')
        model = table.get("model", {})
        if _is_fine_tuning(model, table, source):
            table = _with_fine_tuning_defaults(table, source)
        parts = {
            section: _section(kind, table.get(section, {}), f"{source}: [{section}]")
            for section, kind in _SECTIONS.items()
            if section in table or section not in _OPTIONAL
        }
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


_SECTIONS: Mapping[str, type] = {
    "data": DataSpec,
    "old_data": DataSpec,
    "lora": LoraSpec,
    "train": TrainSpec,
    "compare": CompareSpec,
}
_OPTIONAL = ("old_data", "lora")
# What has to be one for both texts, so that their losses can be compared.
_SHARED_BY_TEXTS = ("tokenizer", "vocab_size", "seq_len")
# A step that teaches fresh weights would wipe out trained ones.
_LEARNING_RATE, _LORA_LEARNING_RATE = 2e-5, 2e-4


def _section(kind: type, values: Mapping[str, Any], where: str) -> Any:
    _known(values, [f.name for f in fields(kind)], where)
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} {error}") from error


def _is_fine_tuning(model: Mapping[str, Any], table: Mapping[str, Any], source: str) -> bool:
    if "checkpoint" in model:
        if "architecture" in model:
            raise ValueError(
                f"{source}: [model] has both architecture (train from scratch) and checkpoint "
                "(fine-tune): give one of them."
            )
        if not isinstance(model["checkpoint"], str):
            raise ValueError(f"{source}: [model] checkpoint must be the path of a folder.")
        return True
    if "architecture" not in model:
        raise ValueError(
            f'{source}: [model] needs architecture, for example "qwen3_moe" or "mixtral", to train '
            "from scratch, or checkpoint, the path of a folder, to fine-tune."
        )
    for section in _OPTIONAL:
        if section in table:
            raise ValueError(
                f"{source}: [{section}] is for fine-tuning: give [model] checkpoint, or leave it "
                "out."
            )
    if table.get("data", {}).get("tokenizer") == "checkpoint":
        raise ValueError(f'{source}: [data] tokenizer="checkpoint" needs [model] checkpoint.')
    return False


def _with_fine_tuning_defaults(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    rate = _LORA_LEARNING_RATE if "lora" in table else _LEARNING_RATE
    data = {"tokenizer": "checkpoint", **table.get("data", {})}
    train = {"learning_rate": rate, **table.get("train", {})}
    filled = {**table, "data": data, "train": train}
    if "old_data" in table:
        shared = {key: data.get(key, getattr(DataSpec, key)) for key in _SHARED_BY_TEXTS}
        for key, value in table["old_data"].items():
            if shared.get(key, value) != value:
                raise ValueError(
                    f"{source}: [old_data] {key}={value!r} differs from [data]'s {shared[key]!r}: "
                    "leave it out, it is the same for both."
                )
        filled["old_data"] = {**table["old_data"], **shared}
    return filled


def _true_or_false(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be true or false, not {type(value).__name__}.")


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


def refuse_frozen(method: "Method", lora: LoraSpec | None) -> None:
    """Refuse a method that works through the routers' gradient where LoRA leaves them frozen.

    `attach` would refuse it as well, but only once the model is loaded.

    Raises:
        ValueError: says which key to change.
    """
    if lora is not None and not lora.train_router and method.traits.charges:
        raise ValueError(
            f"{method!r} works through the gradient of the router, and [lora] train_router = "
            "false leaves every router frozen. Set it to true, or use a selection-lever method "
            "such as loss-free."
        )
