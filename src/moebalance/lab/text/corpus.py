"""Documents with a domain each: from the running Python, a file, a folder or a data set on disk.

Domains matter here: a micro-batch drawn from one domain sees a biased sample of every router's
load, and that bias is what balancing methods differ in. Whatever the source, the result is the
same: documents sorted by domain and name, no two with the same text, and one hash over all of it.

| source | domains | documents |
|---|---|---|
| `"python"` | see `python_text` | one a module, a reference topic, a table |
| a text file | one | blocks of whole lines |
| a folder | one an immediate sub-folder; one for the files directly inside | one a file |
| a `save_to_disk` folder, `.jsonl`, `.json`, `.parquet`, `.csv` | one, or a column | one a row |

Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moebalance.lab.text.python_text import DOMAINS, python_text
from moebalance.words.suggest import did_you_mean

_log = logging.getLogger(__name__)

_TABLE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_BLOCK_CHARACTERS = 8192
_MIN_BLOCKS = 20
_NOT_TEXT = "not UTF-8 text"

# Domain, name, and how to read the text; None where the file is not text.
_Stream = Iterator[tuple[str, str, Callable[[], str | None]]]


class Document(NamedTuple):
    """A text that is never divided between training and validation."""

    domain: str
    name: str
    text: str


class Corpus(NamedTuple):
    """Every document of a source.

    Attributes:
        documents: Sorted by domain, in the order of `domains`, then by name.
        domains: Names of the domains; a document's label is its domain's position here.
        sha256: Hex digest of all domains, names and texts.
    """

    documents: tuple[Document, ...]
    domains: tuple[str, ...]
    sha256: str


def load_corpus(
    source: str,
    *,
    domains: tuple[str, ...] | None = None,
    column: str = "text",
    domain_column: str | None = None,
    extensions: tuple[str, ...] | None = None,
    max_bytes_per_domain: int | None = None,
    cache_dir: Path | None = None,
    render: Callable[[list[Any]], str] | None = None,
) -> Corpus:
    """Read all documents of a source.

    Args:
        source: `"python"`, or the path of a text file, a folder, or a data set on disk.
        domains: Keep only these domains, in this order; None keeps all.
        column: Text column of a data set.
        domain_column: Column with the domain of each row; None makes one domain of the data set.
        extensions: Read only files of a folder with these endings, for example `(".txt",)`.
        max_bytes_per_domain: Keep at most so many bytes of UTF-8 a domain, of documents in an
            order drawn by hash; one document fills at most a tenth of it. None keeps all.
        cache_dir: Where `datasets` may keep its converted tables; None is its own default.
        render: Makes text of a conversation, a list of messages, where `column` holds those.

    Returns:
        The corpus.

    Raises:
        ValueError: The path or a domain or a column does not exist, cannot be read, or holds no
            text.

    >>> load_corpus("python", domains=("names",), max_bytes_per_domain=1000).domains
    ('names',)
    """
    stream: _Stream
    known: tuple[str, ...]
    path = Path(source)
    if source == "python":
        known = DOMAINS
        _check_domains(domains, known, source)
        stream = _python_stream(domains or known)
    elif not path.exists():
        raise ValueError(_no_such_path(source, path))
    elif path.is_dir() and not _is_saved_data_set(path):
        folders = _folder_domains(path, extensions)
        known = tuple(folders)
        _check_domains(domains, known, source)
        stream = _folder_stream(path, {name: folders[name] for name in domains or known})
    elif path.is_dir() or path.suffix.lower() in _TABLE_FORMATS:
        table = _open_table(path, cache_dir)
        _check_columns(table.column_names, column, domain_column, source)
        known = (path.stem,)
        if domain_column:
            known = tuple(sorted(map(str, table.unique(domain_column))))
        _check_domains(domains, known, source)
        stream = _table_stream(
            table, column, domain_column, known[0], set(domains or known), render
        )
    else:
        known = (path.stem,)
        _check_domains(domains, known, source)
        stream = _file_stream(path)
    return _collect(stream, domains or known, max_bytes_per_domain, source)


def _collect(stream: _Stream, domains: tuple[str, ...], limit: int | None, source: str) -> Corpus:
    """Read what fits, drop what is empty, unreadable or a copy, sort and hash."""
    kept: dict[str, list[Document]] = {domain: [] for domain in domains}
    used: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    seen: set[bytes] = set()
    for domain, name, read in stream:
        if limit is not None and used[domain] >= limit:
            continue
        text = read()
        if text is None or not text.strip():
            dropped[_NOT_TEXT if text is None else "empty"] += 1
            continue
        raw = text.encode()
        fingerprint = hashlib.sha256(raw).digest()
        if fingerprint in seen:  # a copy could stand on both sides of the split
            dropped["a copy of another"] += 1
            continue
        seen.add(fingerprint)
        if limit is not None:
            raw = raw[: min(max(limit // 10, 1), limit - used[domain])]
            text = raw.decode(errors="ignore")
            used[domain] += len(raw)
        if text:
            kept[domain].append(Document(domain, name, text))
    for reason, count in dropped.items():
        level = logging.WARNING if reason == _NOT_TEXT else logging.INFO
        _log.log(level, "%s: skipped %d document(s): %s", source, count, reason)
    for domain in domains:
        if not kept[domain]:
            skipped = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            raise ValueError(
                f"source {source!r} has no text in domain {domain!r}"
                f" (skipped: {skipped or 'nothing'}). Give UTF-8 text, or choose other domains."
            )
    documents = tuple(doc for name in domains for doc in sorted(kept[name]))
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    return Corpus(documents, domains, digest.hexdigest())


def _python_stream(domains: tuple[str, ...]) -> _Stream:
    for domain, texts in python_text(domains).items():
        for name in _hash_order(texts):
            yield domain, name, partial(str, texts[name])


def _file_stream(path: Path) -> _Stream:
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


def _folder_stream(root: Path, folders: dict[str, list[Path]]) -> _Stream:
    for domain, paths in folders.items():
        names = {path.relative_to(root).as_posix(): path for path in paths}
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
    column: str,
    domain_column: str | None,
    only: str,
    wanted: set[str],
    render: Callable[[list[Any]], str] | None,
) -> _Stream:
    columns = [column] + ([domain_column] if domain_column else [])
    for number, row in enumerate(table.select_columns(columns)):
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
        if domain in wanted:
            yield domain, f"row {number:09d}", partial(str, text or "")


def _hash_order(names: Iterable[str]) -> list[str]:
    """An order that does not follow the alphabet, so that a capped domain is a fair sample."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _check_domains(asked: tuple[str, ...] | None, known: tuple[str, ...], source: str) -> None:
    for domain in asked or ():
        if domain not in known:
            raise ValueError(
                f"domain {domain!r} is not in source {source!r}; its domains are {list(known)}."
                + did_you_mean(domain, known)
            )


def _check_columns(columns: list[str], column: str, domain_column: str | None, source: str) -> None:
    for name in filter(None, (column, domain_column)):
        if name not in columns:
            raise ValueError(
                f"column {name!r} is not in source {source!r}; its columns are {columns}. "
                f"Set column (text) or domain_column.{did_you_mean(name, columns)}"
            )


def _no_such_path(source: str, path: Path) -> str:
    parent = path.parent
    beside = {str(parent / p.name): p for p in parent.iterdir()} if parent.is_dir() else {}
    return (
        f'source {source!r} is neither "python" nor a path that exists. Nothing is downloaded: '
        "give a text file, a folder with one sub-folder a domain, or a data set on disk."
        + did_you_mean(source, ["python", *beside])
    )
