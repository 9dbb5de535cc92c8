"""Where documents come from: the running Python, a text file, a folder or a data set on disk.

Each source says which domains it has, and reads the documents of some of them one by one, in an
order that does not follow the alphabet. `corpus.py` keeps, drops, sorts and hashes.
"""

from __future__ import annotations

import hashlib
import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moebalance.lab.recipe import DataSpec
from moebalance.lab.text.python_text import DOMAINS, python_text
from moebalance.words.suggest import did_you_mean, instead_of

_TABLE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_BLOCK_CHARACTERS = 8192
_MIN_BLOCKS = 20

Stream = Iterator[tuple[str, str, Callable[[], str | None]]]
"""Domain, name, and what reads the text: None where the file is not text."""


def open_source(
    spec: DataSpec, cache_dir: Path | None, render: Callable[[list[Any]], str] | None
) -> tuple[tuple[str, ...], Callable[[tuple[str, ...]], Stream]]:
    """The domains of a source, and what reads the documents of some of them.

    Args:
        spec: the source, its columns and file endings.
        cache_dir: where `datasets` keeps its converted tables; None is its own default.
        render: makes text of a conversation, a list of messages, in the column.

    Raises:
        ValueError: the source or a column does not exist, or cannot be read.
    """
    path = Path(spec.source)
    if spec.source == "python":
        return DOMAINS, _python_stream
    if not path.exists():
        raise ValueError(_no_such_path(spec.source, path))
    if path.is_dir() and not _is_saved_data_set(path):
        folders = _folder_domains(path, spec.extensions)
        return tuple(folders), partial(_folder_stream, path, folders)
    if path.is_dir() or path.suffix.lower() in _TABLE_FORMATS:
        table = _open_table(path, cache_dir)
        _check_columns(table.column_names, spec)
        known: tuple[str, ...] = (path.stem,)
        if spec.domain_column:
            known = tuple(sorted(map(str, table.unique(spec.domain_column))))
        return known, partial(_table_stream, table, spec, render)
    return (path.stem,), lambda _: _file_stream(path)


def _python_stream(domains: tuple[str, ...]) -> Stream:
    for domain, texts in python_text(domains).items():
        for name in _hash_order(texts):
            yield domain, name, partial(str, texts[name])


def _file_stream(path: Path) -> Stream:
    text = _read_text(path)
    if text is None:
        raise ValueError(
            f"source {str(path)!r} is not UTF-8 text. Give a text file, a folder of them, or a "
            f"data set ({', '.join(_TABLE_FORMATS)}, or a folder of save_to_disk)."
        )
    size = max(1, min(_BLOCK_CHARACTERS, len(text) // _MIN_BLOCKS))
    for number, block in enumerate(_blocks(text, size)):
        yield path.stem, f"block {number:06d}", partial(str, block)


def _blocks(text: str, size: int) -> Iterator[str]:
    """Cut at the first line end after every `size` characters, within another `size`."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size - 1, start + 2 * size) + 1 or start + size
        yield text[start:end]
        start = end


def _folder_domains(root: Path, extensions: tuple[str, ...] | None) -> dict[str, list[Path]]:
    endings = tuple(f".{ending.lstrip('.')}".lower() for ending in extensions or ())
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        place = path.relative_to(root)
        if any(part.startswith(".") for part in place.parts) or not path.is_file():
            continue
        if endings and not path.name.lower().endswith(endings):
            continue
        found[place.parts[0] if len(place.parts) > 1 else root.resolve().name].append(path)
    if not found:
        raise ValueError(
            f"source {str(root)!r} holds no files"
            + (f" ending in {', '.join(endings)}" if endings else "")
            + ". Put text files there, one sub-folder a domain, or name other extensions."
        )
    return dict(sorted(found.items()))


def _folder_stream(root: Path, folders: dict[str, list[Path]], domains: tuple[str, ...]) -> Stream:
    for domain in domains:
        names = {path.relative_to(root).as_posix(): path for path in folders[domain]}
        for name in _hash_order(names):
            yield domain, name, partial(_read_text, names[name])


def _read_text(path: Path) -> str | None:
    """The file's text, or None where it is not UTF-8 text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise ValueError(
            f"cannot read {str(path)!r}: {error.strerror}. Change its permissions or leave it out."
        ) from error
    return None if "\0" in text else text


def _is_saved_data_set(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _open_table(path: Path, cache_dir: Path | None) -> Any:
    """A `datasets.Dataset` of a local path."""
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"source {str(path)!r} is a data set, and `datasets` is not installed. "
            'Run: pip install "moebalance[train]"'
        ) from error
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.load_dataset(
                _TABLE_FORMATS[path.suffix.lower()],
                data_files=str(path),
                split="train",  # the name `datasets` gives to the rows of a lone file
                cache_dir=str(cache_dir) if cache_dir else None,
            )
    # A table without rows is an IndexError from a folder and a ValueError from a file.
    except (datasets.exceptions.DatasetGenerationError, IndexError, ValueError) as error:
        raise ValueError(
            f"source {str(path)!r} cannot be read as a table with rows: "
            f"{error.__cause__ or error}. Give one document a row."
        ) from error
    if isinstance(table, datasets.DatasetDict):
        if "train" not in table:
            raise ValueError(
                f"source {str(path)!r} holds the splits {sorted(table)} and none is named 'train'. "
                "Give the path of one of its sub-folders."
            )
        return table["train"]
    return table


def _table_stream(
    table: Any,
    spec: DataSpec,
    render: Callable[[list[Any]], str] | None,
    domains: tuple[str, ...],
) -> Stream:
    column, domain_column, only = spec.column, spec.domain_column, Path(spec.source).stem
    for number, row in enumerate(table.select_columns(list(filter(None, [column, domain_column])))):
        domain = str(row[domain_column]) if domain_column else only
        text = row[column]
        if isinstance(text, list) and render is not None:
            text = render(text)
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"column {column!r} holds {type(text).__name__}, not text. Name a text column, or, "
                "with the tokeniser of a checkpoint to fine-tune, one of conversations; the "
                f"columns are {table.column_names}."
            )
        if domain in domains:
            yield domain, f"row {number:09d}", partial(str, text or "")


def _hash_order(names: Iterable[str]) -> list[str]:
    """An order that does not follow the alphabet, so that a capped domain is a fair sample."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _check_columns(columns: list[str], spec: DataSpec) -> None:
    for name in filter(None, (spec.column, spec.domain_column)):
        if name not in columns:
            raise ValueError(
                f"column {name!r} is not in source {spec.source!r}: set column (the text) or "
                f"domain_column.{instead_of(name, columns)}"
            )


def _no_such_path(source: str, path: Path) -> str:
    parent = path.parent
    beside = {str(parent / p.name): p for p in parent.iterdir()} if parent.is_dir() else {}
    return (
        f'source {source!r} is neither "python" nor a path that exists. Nothing is downloaded: '
        "give a text file, a folder with one sub-folder a domain, or a data set on disk."
        + did_you_mean(source, ["python", *beside])
    )
