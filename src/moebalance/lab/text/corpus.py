"""Documents with a domain each: from the running Python, a file, a folder or a data set on disk.

A micro-batch of one domain sees a biased sample of every router's load, and balancing methods
differ in how they take that bias. From every source come documents sorted by domain and name, no
two with the same text, and one hash over all of them.

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
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moebalance.lab.recipe import DataSpec
from moebalance.lab.text.sources import Stream, open_source
from moebalance.words.suggest import instead_of

_log = logging.getLogger(__name__)

_NOT_TEXT = "not UTF-8 text"


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
    spec: DataSpec,
    *,
    cache_dir: Path | None = None,
    render: Callable[[list[Any]], str] | None = None,
) -> Corpus:
    """Read all documents of a source.

    Args:
        spec: the source, its columns, domains and limits. Of a domain with a limit, documents are
            read in an order drawn by hash; one document fills at most a tenth of the limit.
        cache_dir: where `datasets` may keep its converted tables; None is its own default.
        render: makes text of a conversation, a list of messages, where the column holds those.

    Returns:
        The corpus.

    Raises:
        ValueError: the path or a domain or a column does not exist, cannot be read, or holds no
            text.

    >>> load_corpus(DataSpec(domains=("names",), max_bytes_per_domain=1000)).domains
    ('names',)
    """
    known, read = open_source(spec, cache_dir, render)
    for domain in spec.domains or ():
        if domain not in known:
            raise ValueError(
                f"domain {domain!r} is not in source {spec.source!r}.{instead_of(domain, known)}"
            )
    chosen = spec.domains or known
    return _collect(read(chosen), chosen, spec.max_bytes_per_domain, spec.source)


def _collect(stream: Stream, domains: tuple[str, ...], limit: int | None, source: str) -> Corpus:
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
    _report_dropped(dropped, domains, kept, source)
    documents = tuple(doc for name in domains for doc in sorted(kept[name]))
    return Corpus(documents, domains, _digest(documents))


def _report_dropped(
    dropped: Counter[str],
    domains: tuple[str, ...],
    kept: dict[str, list[Document]],
    source: str,
) -> None:
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


def _digest(documents: tuple[Document, ...]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    return digest.hexdigest()
