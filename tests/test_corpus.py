"""Corpora: what is read from Python itself, folders, files and data sets, and what is skipped."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest

from missing import hide
from moebalance.lab.recipe import DataSpec
from moebalance.lab.text import corpus as corpora
from moebalance.lab.text.python_text import python_text, split_docstrings


def load_corpus(source: str, *, cache_dir: Path | None = None, **options: object) -> corpora.Corpus:
    return corpora.load_corpus(DataSpec(source, **options), cache_dir=cache_dir)


# --- the text every Python ships ------------------------------------------------------------------


def test_python_text_names_no_path_of_this_machine():
    text = python_text(("code",))["code"]
    assert "argparse.py" in text
    assert not any("site-packages/" in name or "_sysconfigdata" in name for name in text)


def test_docstrings_are_prose_and_the_rest_is_code():
    source = '''#!/usr/bin/env python
"""Module."""

class A:

    r"""Class.

    More.
    """
    x = """not a docstring"""

    def f(self):  # why
        # note
        return {1: 2}
'''
    code, prose = split_docstrings(source)
    assert prose == "Module.\n\nClass.\n\nMore."
    assert 'x = """not a docstring"""' in code
    assert "return {1: 2}" in code
    assert "note" not in code
    assert "Module" not in code
    assert "Class" not in code


def test_a_python_without_source_files_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="frozen or zipped"):
        load_corpus("python")


# --- folders and files ----------------------------------------------------------------------------


def test_folder_domains_are_its_subfolders_and_its_own_files(folder):
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("secret")
    corpus = load_corpus(str(folder))
    assert corpus.domains == ("digits", "letters", "texts")
    assert next(d.name for d in corpus.documents if d.domain == "digits") == "digits/0.txt"
    assert len(corpus.documents) == 12


def test_folder_reads_only_the_extensions_asked_for(folder):
    (folder / "letters" / "x.md").write_text("markdown")
    assert len(load_corpus(str(folder), extensions=("md",)).documents) == 1
    with pytest.raises(ValueError, match=r"holds no files ending in \.rst"):
        load_corpus(str(folder), extensions=(".rst",))


def test_binary_empty_and_copied_files_are_skipped_and_counted(folder, caplog):
    (folder / "letters" / "a.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "letters" / "b.bin").write_bytes(b"text\0")
    (folder / "letters" / "empty.txt").write_text(" \n")
    (folder / "letters" / "copy.txt").write_bytes((folder / "letters" / "0.txt").read_bytes())
    with caplog.at_level(logging.INFO):
        corpus = load_corpus(str(folder))
    assert len(corpus.documents) == 12
    messages = [record.getMessage() for record in caplog.records]
    assert any("skipped 2 document(s): not UTF-8 text" in message for message in messages)
    assert any("skipped 1 document(s): empty" in message for message in messages)
    assert any("skipped 1 document(s): a copy" in message for message in messages)


def test_text_file_becomes_blocks_of_whole_lines(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"line {number} of the book\n" for number in range(3000))
    path.write_text(text)
    corpus = load_corpus(str(path))
    assert corpus.domains == ("book",)
    assert len(corpus.documents) >= 8
    assert "".join(document.text for document in corpus.documents) == text
    assert all(document.text.endswith("\n") for document in corpus.documents)
    path.write_text("".join(map(str, range(999))))  # no line ends
    assert len(load_corpus(str(path)).documents) >= 20


@pytest.mark.parametrize("limit", [1000, 37, 1])
def test_cap_is_kept_and_spread_over_documents(folder, limit):
    corpus = load_corpus(str(folder), max_bytes_per_domain=limit)
    for domain in corpus.domains:
        texts = [d.text for d in corpus.documents if d.domain == domain]
        assert sum(len(text.encode()) for text in texts) <= limit
        assert limit == 1 or len(texts) == 4


def test_hash_changes_with_text_name_and_domain(folder):
    def digest() -> str:
        return load_corpus(str(folder)).sha256

    first = digest()
    assert digest() == first
    file = folder / "letters" / "0.txt"
    text = file.read_text()
    file.write_text(text + ".")
    assert digest() != first
    file.write_text(text)
    assert digest() == first
    file.rename(folder / "letters" / "00.txt")
    assert digest() != first
    (folder / "letters" / "00.txt").rename(file)
    (folder / "letters").rename(folder / "words")
    assert digest() != first


def test_domains_can_be_chosen_and_ordered(folder):
    assert load_corpus(str(folder), domains=("texts", "digits")).domains == ("texts", "digits")


# --- data sets ------------------------------------------------------------------------------------


def table(rows: int = 12) -> dict[str, list[str]]:
    return {
        "body": [f"row {row} says " + "xy"[row % 2] * 60 for row in range(rows)],
        "topic": ["even" if row % 2 == 0 else "odd" for row in range(rows)],
    }


@pytest.mark.parametrize("kind", ["saved", "dict", "jsonl", "parquet", "csv"])
def test_data_sets_on_disk(tmp_path, kind):
    datasets = importlib.import_module("datasets")
    data = datasets.Dataset.from_dict(table())
    path = tmp_path / f"rows.{kind}"
    match kind:
        case "saved":
            data.save_to_disk(str(path))
        case "dict":
            datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(str(path))
        case "jsonl":
            data.to_json(str(path))
        case "parquet":
            data.to_parquet(str(path))
        case "csv":
            data.to_csv(str(path))
    cache = tmp_path / "cache"
    corpus = load_corpus(str(path), column="body", domain_column="topic", cache_dir=cache)
    assert corpus.domains == ("even", "odd")
    assert [d.text for d in corpus.documents if d.domain == "odd"] == table()["body"][1::2]
    one = load_corpus(str(path), column="body", cache_dir=cache)
    assert one.domains == ("rows",)
    assert len(one.documents) == 12
    chosen = load_corpus(
        str(path), column="body", domain_column="topic", domains=("odd",), cache_dir=cache
    )
    assert len(chosen.documents) == 6
    with pytest.raises(ValueError, match=r"column 'bdy' is not in source.*Did you mean 'body'"):
        load_corpus(str(path), column="bdy", cache_dir=cache)


def test_data_set_errors(tmp_path, monkeypatch):
    datasets = importlib.import_module("datasets")
    split = tmp_path / "split"
    datasets.DatasetDict(test=datasets.Dataset.from_dict(table())).save_to_disk(str(split))
    with pytest.raises(ValueError, match=r"splits \['test'\].*sub-folders"):
        load_corpus(str(split))
    numbers = tmp_path / "numbers"
    datasets.Dataset.from_dict({"text": [1, 2]}).save_to_disk(str(numbers))
    with pytest.raises(ValueError, match="holds int, not text"):
        load_corpus(str(numbers))
    nothing = datasets.Dataset.from_dict({"text": []})
    nothing.save_to_disk(str(tmp_path / "empty"))
    nothing.to_parquet(str(tmp_path / "empty.parquet"))
    (tmp_path / "broken.jsonl").write_text("{not json")
    for name in ("empty", "empty.parquet", "broken.jsonl"):
        with pytest.raises(ValueError, match="cannot be read as a table with rows"):
            load_corpus(str(tmp_path / name), cache_dir=tmp_path / "cache")

    hide(monkeypatch, "datasets")
    with pytest.raises(ValueError, match=r"pip install.*moebalance\[train\]"):
        load_corpus(str(numbers))


# --- sources that cannot be read ------------------------------------------------------------------


def test_source_errors(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Did you mean 'python'"):
        load_corpus("pyhton")
    with pytest.raises(
        ValueError, match=r"nor a path that exists.*downloaded.*Did you mean .*text"
    ):
        load_corpus(str(folder)[:-1])
    with pytest.raises(ValueError, match="Did you mean 'prose'"):
        load_corpus("python", domains=("porse",))
    with pytest.raises(ValueError, match="domain 'x' is not in source"):
        load_corpus(str(folder), domains=("x",))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        load_corpus(str(nothing))
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match="has no text in domain 'empty'"):
        load_corpus(str(empty))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_corpus(str(binary))
    (nothing / "a").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"no text in domain 'nothing' \(skipped: 1 not UTF-8"):
        load_corpus(str(nothing))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root
    with pytest.raises(ValueError, match=r"cannot read .*Permission denied"):
        load_corpus(str(folder))
