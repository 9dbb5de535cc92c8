"""What the README and docs/ show is what runs, and leads where it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from datasets import Dataset
from torch.distributed.pipelining import PipelineStage
from trl import SFTConfig

import moebalance as mb
from documents import (
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    copied,
    headings,
    links,
    mentions,
    name_of,
    prose,
)
from families import tiny, tokens
from moebalance.lab.cli import app
from moebalance.words.methods import build_method, split_outside_brackets
from test_trl import tokenizer
from training import QUIET, light_collections

PYTHON = {name_of(page): found for page in PAGES if (found := blocks(page, "python"))}
MARKED = [block for found in PYTHON.values() for block in found if block.mark]
COMMANDS = [(name_of(page), words) for page in PAGES for words in commands(page)]
GROUP = typer.main.get_command(app).commands

TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
}


@pytest.fixture(autouse=True, scope="module")
def _light() -> Iterator[None]:
    with light_collections():
        yield


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def of_the_reader(page: str) -> dict[str, Any]:
    """Names that a page takes from its reader's own program."""
    names: dict[str, Any] = {"mb": mb}
    if page == "docs/integrations.md":
        names |= {"model": tiny("gpt_oss"), "tokenizer": tokenizer()}
        names["args"] = SFTConfig("runs/sft", **QUIET, bf16=False, activation_checkpointing=False)
        names["data"] = Dataset.from_dict({"input_ids": tokens(8, 12, seed=3).tolist()})
    if page == "docs/doctor.md":
        names["model"] = tiny("deepseek_v3")
        names["balancing"] = mb.attach(names["model"], mb.LossFree())
    if page == "docs/report.md":
        router = mb.BalancedRouter(mb.PhiBalancing(), num_experts=4, top_k=1)
        names |= {"balancing": mb.attach(router), "step": 1}
        router(torch.randn(8, 4, requires_grad=True))[0].sum().backward()
        names["balancing"].step()
        names["writer"] = SimpleNamespace(add_image=lambda tag, pixels, step, dataformats: None)
    if page == "docs/layout.md":
        router = mb.BalancedRouter(mb.PhiBalancing(), num_experts=4, top_k=1)
        names |= {"balancing": mb.attach(router), "mean_loss": torch.ones((), requires_grad=True)}
        names |= {"tokens_here": 8, "tokens_in_step": 16, "averaged_ranks": 2}
        # What a stage needs beyond its class are the ranks of a pipeline: tests/test_pipelines.py.
        names |= {"stage": PipelineStage.__new__(PipelineStage), "weights": {"w": torch.ones(2)}}
    return names


@pytest.mark.parametrize("page", PYTHON)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # TRL 1.16
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runnable = [block for block in PYTHON[page] if not block.mark]
    names = {"__name__": "__main__"} | (of_the_reader(page) if runnable else {})
    for block in runnable:
        exec(block.compiled(), names)


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.name)
def test_python_that_is_not_run_here_compiles_and_says_who_runs_it(block: Block) -> None:
    block.compiled()
    assert block.mark in ("run by", "not run")
    assert block.about
    if block.mark == "run by":
        runner = (ROOT / block.about).read_text(encoding="utf-8")
        assert f'"{block.page.name}"' in runner


@pytest.mark.parametrize(("page", "words"), COMMANDS)
def test_a_command_that_is_shown_is_one(page: str, words: list[str]) -> None:
    name, *rest = words
    given = GROUP[name].make_context(name, list(rest)).params  # refuses unknown options, bad values
    methods = [given.get("method"), *split_outside_brackets(given.get("methods") or "", ",")]
    assert all(build_method(method) for method in methods if method)
    files = [word for word in rest if word.startswith(("src/", "evidence/", "benchmarks/"))]
    assert [file for file in files if not (ROOT / file).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_command_that_is_mentioned_has_the_options_it_is_mentioned_with(page: Path) -> None:
    for name, *rest in mentions(page):
        known = {option for parameter in GROUP[name].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("-")} <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_targets_of_make_that_are_shown_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    code = "\n".join(block.code for block in blocks(page, "bash"))
    shown = re.findall(r"^make (\w+)", code, re.MULTILINE)
    shown += re.findall(r"`make (\w+)`", prose(page))
    assert [target for target in shown if f"\n{target}:" not in makefile] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in links(page):
        assert file.is_relative_to(ROOT)
        assert file.exists(), f"{name_of(page)} links to {file}"
        if anchor:
            assert anchor in headings(file), f"{name_of(page)} links to {file.name}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_figures_are_those_of_the_page_that_they_are_from(page: Path) -> None:
    for taken, source in copied(page):
        for row in taken:
            assert any(row.items() <= other.items() for other in source), row


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", prose(page)))
    assert named <= TESTS
    files = set(re.findall(r"`(tests/[\w/]+\.py)`", prose(page)))
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_the_pages_are_found() -> None:
    assert {"README.md", "docs/recipes.md", "docs/tutorials/student.md"} <= set(map(name_of, PAGES))
    assert len(COMMANDS) >= 25
    assert len(MARKED) >= 5
    assert sum(len(list(copied(page))) for page in PAGES) >= 4
