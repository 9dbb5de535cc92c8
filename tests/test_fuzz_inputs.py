"""Fuzz: what comes from files and from users is taken up sound, or refused in words."""

from __future__ import annotations

import copy
import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import moebalance as mb
from cases import plain_top_k, tensors
from fuzzing import fuzz
from moebalance import Balancing, LossFree, Method, PhiBalancing, Together
from moebalance.core.layer import LayerBalance
from moebalance.integrations.names import chosen
from moebalance.lab.recipe import Recipe
from moebalance.methods import observe
from moebalance.runlog import LOG_NAME, read_run
from moebalance.words.methods import build_method, method_classes
from synthetic_runs import write_run

BOTH = Together(PhiBalancing(strength=0.1), LossFree())

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-3, 3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(-3, 3), max_size=2),
)
"""What JSON and TOML can hold."""


def handle(names: tuple[str, ...] = ("a", "b")) -> Balancing:
    return Balancing(BOTH, {name: LayerBalance(BOTH, 4, name=name) for name in names})


def train(balancing: Balancing) -> None:
    """One step of four tokens."""
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for layer in balancing.layers.values():
        layer.count(observe(layer.method, layer.state, plain_top_k(logits, 2)))
    balancing.step()


def sound_after_a_step(balancing: Balancing) -> bool:
    train(balancing)
    layers = balancing.layers.values()
    return all(bool(x.isfinite().all()) for layer in layers for x in tensors(layer.state))


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a["layers"].keys() == b["layers"].keys()
    pairs = [(x, b["layers"][n][k]) for n, held in a["layers"].items() for k, x in held.items()]
    return a["steps"] == b["steps"] and all(torch.equal(x, y) for x, y in pairs)


# --- saved states -----------------------------------------------------------------------------


@st.composite
def odd_tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=2))
    kind = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]))
    value = draw(st.floats(width=32))
    whole = kind == torch.int64
    return torch.full(shape, draw(st.integers(-9, 9)) if whole else value, dtype=kind)


@pytest.mark.survives(
    "Damaged and foreign states",
    "Tables of odd tensors, numbers and words in the place of a state",
    "refused: whole; or it trains on, finite",
)
@fuzz("saved states: tables with odd tensors, numbers and words", 150)
@given(st.data())
def test_a_spoilt_state_is_refused_whole_or_trains(data: st.DataObject) -> None:
    balancing = handle()
    train(balancing)
    before = balancing.state_dict()
    state: dict[str, Any] = copy.deepcopy(before)
    for _ in range(data.draw(st.integers(1, 2))):
        held: dict[Any, Any] = state
        while True:
            key = data.draw(st.sampled_from(sorted(held, key=str)))
            inner = held[key]
            if not isinstance(inner, dict) or not inner or data.draw(st.integers(0, 9)) == 0:
                break
            held = inner
        if isinstance(inner, Tensor) and data.draw(st.booleans()):
            held[key] = inner.clone().fill_(data.draw(st.floats(width=32)))
        else:
            held[key] = data.draw(st.one_of(PLAIN, odd_tensors()))
    try:
        balancing.load_state_dict(state)
    except ValueError:
        assert same(balancing.state_dict(), before)
    else:
        assert sound_after_a_step(balancing)


def hurt(data: st.DataObject, content: bytes) -> bytes:
    """Bytes cut off, changed or put in."""
    place = data.draw(st.integers(0, len(content) - 1))
    what = data.draw(st.sampled_from(["cut", "change", "insert"]))
    if what == "cut":
        return content[:place]
    new = data.draw(st.binary(min_size=1, max_size=4))
    return content[:place] + new + content[place + (len(new) if what == "change" else 0) :]


@pytest.mark.survives(
    "Damaged and foreign states",
    "A state file with bytes cut off, changed or put in",
    "refused: the state stays; or it trains on, finite",
)
@fuzz("state files: bytes cut off, changed or put in", 150)
@given(st.data())
def test_a_hurt_state_file_is_refused_or_trains(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    balancing = handle()
    train(balancing)
    file = mb.huggingface.save(balancing, folder)
    whole = balancing.state_dict()
    file.write_bytes(hurt(data, file.read_bytes()))
    try:
        mb.huggingface.load(balancing, folder)
    except ValueError:
        assert same(balancing.state_dict(), whole)
    else:
        assert sound_after_a_step(balancing)


# --- run logs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), "phi", steps=20, experts=4) / LOG_NAME


@pytest.mark.survives(
    "Files and pages",
    "A run log with bytes cut off, changed or put in",
    "refused: by name; or it is read",
)
@fuzz("run logs: bytes cut off, changed or put in", 150)
@given(st.data())
def test_a_hurt_log_is_read_or_refused_by_name(log: Path, data: st.DataObject) -> None:
    other = log.parent / "hurt.jsonl"
    other.write_bytes(hurt(data, log.read_bytes()))
    try:
        run = read_run(other)
    except ValueError as refused:
        assert str(other) in str(refused)  # noqa: PT017 both ways are right, in their own words
    else:
        assert isinstance(run.method, str)


@fuzz("run logs: rows of any JSON", 150)
@given(st.lists(st.dictionaries(st.sampled_from(["kind", "step", "format", "method", "x"]), PLAIN)))
def test_a_log_of_any_rows_is_read_or_refused_by_name(
    log: Path, rows: list[dict[str, Any]]
) -> None:
    other = log.parent / "rows.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        read_run(other)
    except ValueError as refused:
        assert str(other) in str(refused)  # noqa: PT017 as above


# --- recipes, method words and names ----------------------------------------------------------

WHOLE: dict[str, Any] = {
    "model": {"architecture": "mixtral", "hidden_size": 16},
    "data": {"source": "here", "seq_len": 16, "tokenizer": "bytes"},
    "train": {"steps": 6, "batch_size": 2, "learning_rate": 1e-3},
    "compare": {"methods": ["phi"], "seeds": [0, 1]},
    "method": {"name": "phi", "strength": 0.1},
}


@pytest.mark.survives(
    "Files and pages",
    "A recipe with odd keys and values",
    "refused: by name and key",
)
@fuzz("recipes: tables with odd keys and values", 250)
@given(st.data())
def test_an_odd_recipe_is_read_or_refused_by_name(data: st.DataObject) -> None:
    table = copy.deepcopy(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from([*table, "lora", "old_data", "methods", "name"]))
        held = table.get(section)
        if isinstance(held, dict) and data.draw(st.integers(0, 4)):
            key = data.draw(st.one_of(st.sampled_from(sorted(held) or ["x"]), st.text(max_size=6)))
            held[key] = data.draw(PLAIN)
        else:
            table[section] = data.draw(PLAIN)
    try:
        recipe = Recipe.parse(table, source="odd.toml")
    except ValueError as refused:
        assert "odd.toml" in str(refused)  # noqa: PT017 as above
    else:
        assert recipe.train.steps >= 0


WORDS = st.one_of(
    st.sampled_from(sorted(method_classes())),
    st.sampled_from(["strength", "speed", "rate", "load", "potential", "target", "schedule"]),
    st.sampled_from([*"()=+,.-'\"[]{}:", "hard", "auto", "Tsallis", "MaxVio(0.3)", "0.1", "1e-3"]),
    st.text(alphabet=string.printable, max_size=3),
    st.text(max_size=2),
)
OPTION = st.builds(
    lambda key, value: f"{key}={value}",
    st.sampled_from(
        ["strength", "speed", "rate", "memory_tokens", "load", "peek", "scale", "bins"]
    ),
    st.one_of(st.floats().map(str), st.integers(-9, 9).map(str), WORDS),
)
CALL = st.builds(
    lambda word, options: f"{word}({', '.join(options)})",
    st.sampled_from(sorted(method_classes())),
    st.lists(OPTION, max_size=2),
)
PHRASES = st.one_of(
    st.lists(WORDS, max_size=8).map("".join), st.lists(CALL, min_size=1, max_size=3).map("+".join)
)


@pytest.mark.survives(
    "Files and pages",
    "A method in odd words",
    "refused: with what is possible",
)
@fuzz("method words: from letters, words and calls", 600)
@given(PHRASES)
def test_words_are_a_method_that_its_repr_builds_again_or_are_refused(words: str) -> None:
    try:
        method = build_method(words)
    except (ValueError, TypeError) as refused:
        assert str(refused)  # noqa: PT017 as above
        return
    assert isinstance(method, Method)
    known = {**vars(mb), **vars(mb.methods), **vars(mb.potentials)}
    again = eval(repr(method), {**known, "nan": float("nan"), "inf": float("inf")})
    assert repr(again) == repr(method)


@fuzz("layer names: any text, in state files", 60)
@given(st.sets(st.text(min_size=1, max_size=12), min_size=1, max_size=3))
def test_layers_of_any_name_are_saved_and_loaded(
    tmp_path_factory: pytest.TempPathFactory, names: set[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    saved, loaded = handle(tuple(names)), handle(tuple(names))
    train(saved)
    mb.huggingface.save(saved, folder)
    mb.huggingface.load(loaded, folder)
    assert same(loaded.state_dict(), saved.state_dict())


@fuzz("layer patterns: any text against any names", 200)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=4), st.text(max_size=6))
def test_a_pattern_chooses_names_in_their_order_or_is_refused(
    names: list[str], pattern: str
) -> None:
    try:
        found = chosen(names, pattern)
    except ValueError as refused:
        assert "chooses none" in str(refused)  # noqa: PT017 as above
    else:
        assert found == [name for name in names if name in found]
        assert found
