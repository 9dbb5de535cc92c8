"""The command line end to end, small, and what it says of a wrong word."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import moebalance as mb
from experiments import write_text, write_toml
from moebalance.lab.cli import app
from moebalance.words.methods import build_method

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_the_command_line_trains_compares_and_reports(text: Path, tmp_path: Path) -> None:
    recipe = write_toml(tmp_path / "r.toml", text)
    call = CliRunner().invoke
    done = call(app, ["train", str(recipe), "--out", str(tmp_path / "one")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "one" / "report.html").is_file()
    done = call(
        app,
        [
            *("compare", str(recipe), "--out", str(tmp_path / "many"), "--workers", "1"),
            *("--methods", "none,phi(strength=0.01,rate=0.5)", "--seeds", "1"),
        ],
    )
    assert done.exit_code == 0, done.output
    assert done.output.rstrip().endswith("report.html")
    done = call(app, ["report", str(tmp_path / "many"), "--figure", str(tmp_path / "figure.svg")])
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.toml"], "No recipe at nowhere.toml"),
        (["demo", "--methods", "fi"], "Unknown method 'fi'"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_the_command_line_says_what_is_wrong_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_the_command_says_its_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.output == f"moebalance {mb.__version__}\n"


def test_a_misspelt_option_is_told_of_all_that_a_recipe_may_say() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'target'\?.*strength.*target, schedule"):
        build_method("phi(targt=1)")


def test_wrong_types_are_named_and_brackets_survive_the_terminal(
    text: Path, tmp_path: Path
) -> None:
    recipe = write_toml(tmp_path / "r.toml", text)
    for old, new, message in (
        ("steps = 3", 'steps = "3"', "[train] steps='3': must be an integer, not str"),
        ("name = 'phi'", "name = 'phi'\nstrength = 'x'", "strength='x': must be a number"),
        ("num_experts = 8", "num_expert = 8", "[model] qwen3_moe has no configuration key"),
    ):
        changed = tmp_path / "changed.toml"
        changed.write_text(recipe.read_text().replace(old, new))
        done = CliRunner().invoke(app, ["train", str(changed), "--out", str(tmp_path / "out")])
        assert done.exit_code == 2
        assert message in done.output.replace("\n", " ")
