"""Text for a run: read, split by document, tokenised, packed, hashed.

    documents ──split──▶ training, validation ──tokenise──▶ ids ──pack──▶ (N, S) with a domain each

Each stage is a pure function of its input and the recipe. The tokeniser learns from the training
documents only. `TextData.sha256` covers the ids: two runs with the same hash have read the same
tokens, with any version of the libraries.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int32
from torch import Tensor

from moebalance.files import writing
from moebalance.lab.recipe import DataSpec
from moebalance.lab.text.batches import TokenDataset
from moebalance.lab.text.corpus import Corpus, Document, load_corpus
from moebalance.lab.text.tokens import (
    ByteTokenizer,
    Tokenizer,
    bpe_version,
    tokenizer_from_json,
    train_bpe,
)

_log = logging.getLogger(__name__)


class TextData(NamedTuple):
    """Packed text, ready for training.

    Attributes:
        train: Training sequences; read them through `TokenDataset.in_order`.
        validation: Held-out sequences, by domain.
        domains: Names of the domains.
        tokenizer: The tokeniser of both.
        sha256: Hex digest of text, tokeniser, split and sequence length.
        train_tokens: Tokens in training sequences, by domain.
        val_tokens: The same for validation.
        bytes_per_token: Bytes of validation text a token stands for, the end of a document counted
            as one byte: exactly 1 for bytes. Bits per byte = nats per token / (ln 2 · this).
    """

    train: TokenDataset
    validation: TokenDataset
    domains: tuple[str, ...]
    tokenizer: Tokenizer
    sha256: str
    train_tokens: dict[str, int]
    val_tokens: dict[str, int]
    bytes_per_token: float

    def header(self) -> dict[str, Any]:
        """What a run header records of the data; plain JSON values."""
        return {
            "sha256": self.sha256,
            "tokenizer": self.tokenizer.description,
            "vocab_size": self.tokenizer.vocab_size,
            "seq_len": self.train.tokens.shape[1],
            "domains": list(self.domains),
            "train_tokens": self.train_tokens,
            "val_tokens": self.val_tokens,
            "bytes_per_token": self.bytes_per_token,
        }


def load_data(
    spec: DataSpec, *, tokenizer: Tokenizer | None = None, cache_dir: Path | None = None
) -> TextData:
    """Read, split, tokenise and pack the text of a recipe.

    Args:
        spec: What to read and how.
        tokenizer: Instead of making the one that `spec` names; `"checkpoint"` needs it.
        cache_dir: Where to keep token ids between runs, under a name made of the text's hash;
            None keeps nothing.

    Returns:
        Training and validation sequences.

    Raises:
        ValueError: The source cannot be read, a domain is too small to be split or to fill a
            sequence, or the checkpoint's tokeniser was not given.

    >>> data = load_data(DataSpec(domains=("names",), max_bytes_per_domain=20_000))
    >>> data.train[0]["input_ids"].shape, data.tokenizer.vocab_size, data.bytes_per_token
    (torch.Size([128]), 257, 1.0)
    """
    if spec.tokenizer == "checkpoint" and tokenizer is None:
        raise ValueError('tokenizer="checkpoint" needs the tokeniser of a model to fine-tune.')
    render = None if tokenizer is None else tokenizer.render
    corpus = load_corpus(spec, cache_dir=cache_dir, render=render)
    parts = split_documents(corpus, validation=spec.validation, seed=spec.split_seed)
    tokenizer, train_streams, val_streams = _tokenise(spec, corpus, parts, tokenizer, cache_dir)
    train, train_tokens = _pack_domains(train_streams, corpus.domains, spec.seq_len, "training")
    val, val_tokens = _pack_domains(val_streams, corpus.domains, spec.seq_len, "validation")

    digest = hashlib.sha256()
    for part in (corpus.sha256, tokenizer.to_json(), str(spec.seq_len)):
        digest.update(part.encode())
    for stream in train_streams + val_streams:
        digest.update(stream.numel().to_bytes(8, "little"))
        digest.update(stream.numpy().tobytes())

    # The last document of a domain has no end of document after it.
    size = sum(len(doc.text.encode()) + 1 for doc in parts[1]) - len(corpus.domains)
    return TextData(
        train=train,
        validation=val,
        domains=corpus.domains,
        tokenizer=tokenizer,
        sha256=digest.hexdigest(),
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        bytes_per_token=size / sum(map(len, val_streams)),
    )


def split_documents(
    corpus: Corpus, *, validation: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Divide the documents of each domain into training and validation.

    Documents are taken for validation in an order drawn by hash of seed and name, each if it
    brings the held-out bytes nearer to their share; if none does, the first that is not longer than
    the average.

    Args:
        corpus: At least two documents a domain.
        validation: Share of a domain's bytes to hold out, in (0, 0.5]; then never all are taken.
        seed: Changes the order.

    Returns:
        Training documents and validation documents, each in the corpus's order and neither empty
        in any domain.

    Raises:
        ValueError: A domain has a single document.
    """
    held_out: set[Document] = set()
    for domain in corpus.domains:
        mine = [doc for doc in corpus.documents if doc.domain == domain]
        if len(mine) < 2:
            raise ValueError(
                f"domain {domain!r} has one document, {mine[0].name!r}, and documents are never "
                "divided between training and validation. Give it a second one (cut the file in "
                "two), leave the domain out, or give a lone text file itself as source."
            )
        size = {doc: len(doc.text.encode()) for doc in mine}
        target, taken = validation * sum(size.values()), 0.0
        order = sorted(mine, key=lambda doc: _rank(seed, doc))
        for doc in order:
            if taken + size[doc] / 2 <= target:
                held_out.add(doc)
                taken += size[doc]
        if not taken:
            held_out.add(next(doc for doc in order if size[doc] * len(mine) <= sum(size.values())))
    return (
        [doc for doc in corpus.documents if doc not in held_out],
        [doc for doc in corpus.documents if doc in held_out],
    )


def join(texts: Sequence[Int32[Tensor, " n"]], end_of_document: int) -> Int32[Tensor, " N"]:
    """One stream of ids, with an end of document between two texts."""
    between = torch.tensor([end_of_document], dtype=texts[0].dtype)
    return torch.cat([part for text in texts for part in (between, text)][1:])


def cut(stream: Int32[Tensor, " N"], seq_len: int) -> tuple[Int32[Tensor, "M S"], int]:
    """Sequences of S ids, and how many ids at the end were too few for another.

    >>> cut(join([torch.tensor([1, 2]), torch.tensor([3, 4])], end_of_document=9), seq_len=2)
    (tensor([[1, 2],
            [9, 3]]), 1)
    """
    count, rest = divmod(len(stream), seq_len)
    return stream[: count * seq_len].view(count, seq_len), rest


def _tokenise(
    spec: DataSpec,
    corpus: Corpus,
    parts: tuple[list[Document], list[Document]],
    tokenizer: Tokenizer | None,
    cache_dir: Path | None,
) -> tuple[Tokenizer, list[Tensor], list[Tensor]]:
    """The tokeniser and one joined stream of ids a domain, for training and for validation."""
    path = cache_dir / _cache_name(spec, corpus, parts[1], tokenizer) if cache_dir else None
    stored = _read_cache(path)
    if stored is not None:
        made = tokenizer or tokenizer_from_json(stored["tokenizer"])
        return made, stored["train"], stored["validation"]
    made = tokenizer or _make_tokenizer(spec, parts[0])
    train, val = (_streams(made, documents, corpus.domains) for documents in parts)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # renamed whole: runs may share a cache
        content = {"tokenizer": made.to_json(), "train": train, "validation": val}
        try:
            with writing(path):
                torch.save(content, unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return made, train, val


def _cache_name(
    spec: DataSpec, corpus: Corpus, held_out: list[Document], tokenizer: Tokenizer | None
) -> str:
    settings = (
        corpus.sha256,
        spec.tokenizer,
        (spec.vocab_size, bpe_version()) if spec.tokenizer == "bpe" else None,
        [(doc.domain, doc.name) for doc in held_out],
        None if tokenizer is None else tokenizer.to_json(),
    )
    return f"tokens-{hashlib.sha256(repr(settings).encode()).hexdigest()[:32]}.pt"


def _streams(
    tokenizer: Tokenizer, documents: list[Document], domains: tuple[str, ...]
) -> list[Tensor]:
    by_domain = ([doc.text for doc in documents if doc.domain == name] for name in domains)
    return [join(tokenizer.encode_all(texts), tokenizer.end_of_document) for texts in by_domain]


def _make_tokenizer(spec: DataSpec, train_docs: Sequence[Document]) -> Tokenizer:
    if spec.tokenizer == "bytes":
        return ByteTokenizer()
    tokenizer = train_bpe([doc.text for doc in train_docs], spec.vocab_size)
    if tokenizer.vocab_size < spec.vocab_size:
        _log.warning(
            "the training text has pairs for %d ids only, of the %d asked for",
            tokenizer.vocab_size,
            spec.vocab_size,
        )
    return tokenizer


def _read_cache(path: Path | None) -> dict[str, Any] | None:
    if path is None or not path.is_file():
        return None
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        if not isinstance(content, dict) or {"tokenizer", "train", "validation"} - content.keys():
            raise ValueError("it holds something else")
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        _log.warning("%s is damaged (%s); tokenising again", path, error)
        return None
    return content


def _pack_domains(
    streams: Sequence[Tensor], names: tuple[str, ...], seq_len: int, part: str
) -> tuple[TokenDataset, dict[str, int]]:
    packed = [cut(stream, seq_len)[0] for stream in streams]
    for name, stream, sequences in zip(names, streams, packed, strict=True):
        if not len(sequences):
            raise ValueError(
                f"domain {name!r} has {len(stream)} tokens of {part} text, fewer than one sequence "
                f"of {seq_len}. Give it more text, a shorter seq_len"
                + (", a larger validation share" if part == "validation" else "")
                + ", or leave it out."
            )
    counts = torch.tensor([len(sequences) for sequences in packed])
    labels = torch.arange(len(names)).repeat_interleave(counts)
    tokens = {name: part.numel() for name, part in zip(names, packed, strict=True)}
    return TokenDataset(torch.cat(packed), labels, names), tokens


def _rank(seed: int, doc: Document) -> bytes:
    return hashlib.sha256(f"{seed}/{doc.domain}/{doc.name}".encode()).digest()
