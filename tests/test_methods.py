"""Words people type, recipes they write: what becomes of them, and what is refused how."""

import doctest
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

import moebalance as mb
from moebalance import Method, Scheduled, Targeted, Together
from moebalance.lab.recipe import Recipe
from moebalance.words import methods
from moebalance.words.methods import build_method, method_classes, split_outside_brackets

MINIMAL = {"model": {"architecture": "mixtral"}}


def test_doctests() -> None:
    assert doctest.testmod(methods).failed == 0


def test_every_exported_method_has_a_word_and_can_be_built() -> None:
    exported = {
        kind
        for name in mb.methods.__all__
        if isinstance(kind := getattr(mb.methods, name), type) and issubclass(kind, Method)
    } - {Method, Scheduled, Targeted, Together}
    assert set(method_classes().values()) == exported
    for word, kind in method_classes().items():
        assert build_method(word) == kind()


def test_words_compose_and_take_options_from_brackets_and_tables() -> None:
    built = build_method(
        "phi(rate=0.5, potential='Tsallis')+loss-free",
        {"phi": {"rate": 0.1, "strength": 0.2}, "loss-free": {"recentre": True}},
    )
    potential = mb.potentials.Tsallis()
    first = mb.PhiBalancing(potential, strength=0.2, rate=0.5)
    assert built == mb.Together(first, mb.LossFree(recentre=True))


def test_a_potential_takes_options_and_a_unit_slope() -> None:
    table = {"name": "LpNorm", "p": 4.0, "unit_slope": True}
    assert (
        build_method("phi", {"phi": {"potential": table}}).potential
        == mb.potentials.LpNorm(4.0).unit_slope()
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loss_free", {}, "Unknown method 'loss_free'. Did you mean 'loss-free'"),
        ("phi", {"phi": {"strenght": 1}}, "no option 'strenght'. Did you mean 'strength'"),
        ("phi(strength=0.1", {}, "write it like phi"),
        ("phi(0.1)", {}, "options are written name=value"),
        ("phi(strength=-1)", {}, r"strength=-1: must be a finite number at least 0"),
        ("phi(rate=2)", {}, r"rate=2: must lie in \(0, 1\]"),
        ("phi", {"phi": {"potential": "NegEntropy"}}, "Did you mean 'NegativeEntropy'"),
        ("phi(potential={'name': 'LpNorm', 'q': 2})", {}, "Potential LpNorm has no option 'q'"),
        ("loss-free+quantile", {}, "both choose experts"),
    ],
)
def test_a_bad_method_is_refused_with_what_is_possible(
    name: str, options: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(name, options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fi", "Unknown method 'fi'. Did you mean 'phi'"),
        ("φ", "Did you mean 'phi'"),
        ("Tsalis", "The potential Tsallis is written phi"),
        ("phi(potential=Tsalis)", "Unknown potential 'Tsalis'. Did you mean 'Tsallis'"),
        ("phi(potential=tsallis)", "Did you mean 'Tsallis'"),
        ("phi(strength=abc)", "strength='abc': must be a number"),
        ("phi(target=abc)", "target='abc': must be a number, the MaxVio that you want"),
        ("phi(strength=1/3)", "strength=1 / 3 is not a number, a name, a list or a {table}"),
        ("phi(peek=no)", "peek='no': must be true or false"),
    ],
)
def test_a_misspelt_value_is_named_in_words_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as refused:
        build_method(name)
    assert "object at 0x" not in str(refused.value)


def test_a_name_as_a_value_needs_no_quotes() -> None:
    assert build_method("phi(potential=Tsallis, peek=false)") == mb.PhiBalancing(
        mb.potentials.Tsallis(), peek=False
    )


def test_a_schedule_has_the_options_of_its_class_and_no_method() -> None:
    with pytest.raises(ValueError, match=r"A schedule has no option 'method'.*Possible: warmup_t"):
        build_method("phi(schedule={'method': 1})")


def test_a_class_in_capitals_is_one_word() -> None:
    assert methods.word(type("SMEBU", (), {})) == "smebu"


def test_a_wrapper_is_recognised_by_needing_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Halved(mb.methods.Method):
        method: mb.Method

    @dataclass(frozen=True)
    class SoftNudge(mb.methods.Method):
        strength: float = 1.0

    for kind in (Halved, SoftNudge):
        monkeypatch.setattr(mb.methods, kind.__name__, kind, raising=False)
    monkeypatch.setattr(mb.methods, "__all__", [*mb.methods.__all__, "Halved", "SoftNudge"])
    assert method_classes()["soft-nudge"] is SoftNudge
    assert Halved not in method_classes().values()


def test_commas_inside_brackets_do_not_split() -> None:
    assert split_outside_brackets("a(x=1,y=[2,3]), b", ",") == ["a(x=1,y=[2,3])", "b"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, r"\[model\] needs architecture"),
        ({**MINIMAL, "trian": {}}, "unknown key 'trian'. Did you mean 'train'"),
        ({**MINIMAL, "train": {"step": 3}}, r"\[train\]: unknown key 'step'. Did you mean 'steps'"),
        ({**MINIMAL, "train": {"steps": 0}}, "steps=0: must be at least 1"),
        ({**MINIMAL, "train": {"batching": "one_domain"}}, "Did you mean 'one-domain'"),
        ({**MINIMAL, "train": {"learning_rate": 0}}, "learning_rate=0: must be greater than 0"),
        ({**MINIMAL, "train": {"warmup": 2}}, "warmup=2"),
        ({**MINIMAL, "data": {"tokenizer": "byte"}}, "bytes"),
        ({**MINIMAL, "compare": {"seeds": []}}, r"\[compare\] seeds=\[\]: give at least one"),
        ({**MINIMAL, "compare": {"batching": ["x"]}}, "Possible: mixed, one-domain, shift"),
        ({**MINIMAL, "compare": {"methods": ["phi", "phi"]}}, "give each one once"),
        ({**MINIMAL, "methods": {"phi": 1}}, r"phi=1: must be a table, \[methods.phi\]"),
        ({**MINIMAL, "train": {"bf16": 1}}, "bf16=1: must be true or false, not int"),
        ({**MINIMAL, "method": {"strength": 1}}, r"\[method\] needs name"),
        ({**MINIMAL, "model": "mixtral"}, r"model='mixtral': must be a table, \[model\]"),
    ],
)
def test_a_bad_recipe_is_refused_with_its_place(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse(table, source="r.toml")


def test_a_recipe_file_must_exist_and_be_toml(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No recipe at"):
        Recipe.read(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("[model\n")
    with pytest.raises(ValueError, match="is not TOML"):
        Recipe.read(bad)


def test_every_committed_recipe_reads() -> None:
    root = Path(__file__).parents[1]
    recipes = [*root.glob("evidence/recipes/**/*.toml"), *root.glob("src/**/recipes/*.toml")]
    assert len(recipes) >= 2
    for path in recipes:
        recipe = Recipe.read(path)
        for method in recipe.compare.methods:
            build_method(method, recipe.methods)


def test_methods_are_frozen_dataclasses() -> None:
    for kind in method_classes().values():
        assert kind.__dataclass_params__.frozen
        assert all(field.init for field in fields(kind))
