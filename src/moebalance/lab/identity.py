"""Which run this is, and what tells it from an earlier one in the same folder."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from moebalance.files import loads, writing
from moebalance.lab.recipe import Recipe
from moebalance.methods import Method
from moebalance.runlog import Row, Run, read_run
from moebalance.words.methods import build_method, check_tables, without_options


class Identity(NamedTuple):
    """What tells a run from the others of its recipe.

    Attributes:
        method: words of the method, without options.
        method_repr: `repr` of the method.
        seed: seed of fresh weights and data order.
        batching: kind of micro-batch.
        fingerprint: of the checkpoint that fine-tuning starts from; None from scratch.
    """

    method: str
    method_repr: str
    seed: int
    batching: str
    fingerprint: str | None


def own_method(recipe: Recipe) -> tuple[str, Recipe]:
    """The words of a recipe's [method], and the recipe with that table's options in [methods].

    Of several methods in one name, the options are the first one's.

    Raises:
        TypeError, ValueError: a table of [methods] with an unknown word or option.
    """
    check_tables(recipe.methods)
    options = dict(recipe.method)
    words = str(options.pop("name"))
    first = without_options(words).partition("+")[0]
    if options or first == words:
        recipe = replace(recipe, methods={**recipe.methods, first: options})
    return words, recipe


def recipe_method(recipe: Recipe, words: str) -> Method:
    """The method that words mean in a recipe.

    Raises:
        ValueError: an unknown word or option; or the method needs the gradient of the routers, and
            the recipe freezes them. `attach` refuses that too, but only once the model is loaded.
    """
    method = build_method(words, recipe.methods)
    if recipe.lora is not None and not recipe.lora.train_router and method.traits.charges:
        raise ValueError(
            f"{method!r} works through the gradient of the router, and [lora] train_router = "
            "false leaves every router frozen. Set it to true, or use a method that selects, "
            "such as loss-free."
        )
    return method


def identify(recipe: Recipe, words: str, seed: int, batching: str) -> Identity:
    """The identity of a run of this recipe.

    Raises:
        FileNotFoundError, ValueError: the method or the checkpoint cannot be used.
    """
    made = recipe_method(recipe, words)
    origin = None
    if recipe.checkpoint is not None:
        # Imported here: a recipe that trains from scratch needs no model library for this.
        from moebalance.lab.checkpoints import checkpoint_folder, fingerprint

        origin = fingerprint(checkpoint_folder(recipe.checkpoint))
    return Identity(without_options(words), repr(made), seed, batching, origin)


def differences(run: Run, recipe: Recipe, identity: Identity) -> dict[str, tuple[Any, Any]]:
    """What differs between a logged run and the one asked for: by key, the value then and now.

    How the model is laid out over ranks may change, so it is no difference.

    Raises:
        ValueError: the log's recipe cannot be read.
    """
    # Parsed: a recipe that an earlier version logged gets the defaults of the newer keys.
    then = Recipe.parse(run.header.get("recipe") or {}, source=f"the recipe in {run.path}")
    logged = _identity_of(run.header)
    found = [(_IN_WORDS[f], getattr(logged, f), getattr(identity, f)) for f in _IN_WORDS]
    found += _changed(_relevant(then), _relevant(recipe))
    return {key: (before, now) for key, before, now in found if before != now}


def refuse_other_run(path: Path, recipe: Recipe, identity: Identity) -> bool:
    """Refuse to go on with a run that was started as another one; say whether it is made longer.

    Raises:
        ValueError: names every key that differs, with both values.
    """
    found = differences(read_run(path), recipe, identity)
    steps = found.get(_STEPS)
    # Under "shift" the text changes half-way: a longer run reads another text from there.
    longer = steps is not None and steps[1] > steps[0] and identity.batching != "shift"
    if longer:
        del found[_STEPS]
    if found:
        changed = "; ".join(f"{key}: {_short(a)} → {_short(b)}" for key, (a, b) in found.items())
        raise ValueError(
            f"{path} is of another run: {changed}. Resume with what it was started with, or choose "
            "another folder (--out)."
        )
    return longer


def _short(value: Any) -> str:
    """A value as text, and of a digest the beginning."""
    text = str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text


def log_longer(path: Path, recipe: Recipe) -> None:
    """Write the new number of steps into the header of a log, and keep the earlier ones there."""
    with path.open("rb") as log:
        header = loads(log.readline())
        header["earlier_steps"] = [*header.get("earlier_steps", []), header.get("steps")]
        header |= {"steps": recipe.train.steps, "recipe": recipe.as_dict()}
        whole = path.with_suffix(".partial")
        with writing(path), whole.open("wb") as out:
            out.write(json.dumps(header, ensure_ascii=False).encode() + b"\n")
            shutil.copyfileobj(log, out)
        whole.replace(path)


_STEPS = "[train] steps"
_IN_WORDS = {
    "method_repr": "method",
    "seed": "seed",
    "batching": "batching",
    "fingerprint": "content of the checkpoint",
}


def _relevant(recipe: Recipe) -> dict[str, Any]:
    """What a run depends on next to its identity, through JSON as a log has it."""
    table: dict[str, Any] = json.loads(json.dumps(recipe.as_dict()))
    train = {k: v for k, v in table["train"].items() if k not in ("batching", "sharded")}
    return {**{key: table[key] for key in ("model", "data", "old_data", "lora")}, "train": train}


def _changed(
    then: Mapping[str, Any], now: Mapping[str, Any], section: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*then, *now]):
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changed(before, after, section=f"[{key}] ")
        else:
            yield section + key, before, after


def _identity_of(header: Row) -> Identity:
    model = header.get("model")
    origin = model.get("fingerprint") if isinstance(model, Mapping) else None
    logged = {field: header.get(field) for field in Identity._fields}
    return Identity(**{**logged, "fingerprint": origin})  # type: ignore[arg-type]
