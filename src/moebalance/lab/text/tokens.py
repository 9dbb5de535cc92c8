"""Two tokenisers that need no download: bytes, and byte-level pairs learnt from the training text.

Both are lossless, `decode(encode(text)) == text` for every text that UTF-8 can write, and both
keep their last id for the end of a document, which no text encodes to.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int32
from torch import Tensor

from moebalance.files import write_text

TOKENIZER_FILE = "moebalance_tokenizer.json"
"""File of one of these tokenisers in the folder of the model that was trained with it."""

BYTE_VALUES = 256
# Pairs are learnt from a sample: the first bytes of each text, so much in all.
_TRAINING_CHARACTERS = 4_000_000


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: Number of ids, the end of a document included.
        description: What a run header says of it.
    """

    vocab_size: int
    description: str

    @property
    def end_of_document(self) -> int:
        """The id that separates documents: the last one."""
        return self.vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of document.

        Raises:
            UnicodeEncodeError: The text holds half of a surrogate pair.
        """
        ids: list[int] = self.encode_all([text])[0].tolist()
        return ids

    @abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[Int32[Tensor, " N"]]:
        """The ids of each text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; ends of documents are left out, broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def to_json(self) -> str:
        """Everything needed to make it again with `tokenizer_from_json`."""

    def render(self, messages: list[Any]) -> str:
        """The text of a conversation.

        Raises:
            ValueError: This tokeniser has no chat template.
        """
        raise ValueError(
            f"Conversations need a chat template, and the tokeniser {self.description} has none: "
            "fine-tune a checkpoint that brings one, or give a column of text."
        )

    def save(self, path: Path) -> None:
        """Write it to a file for `load_tokenizer`."""
        write_text(path, self.to_json())

    def save_beside(self, model: Path) -> None:
        """Write it into a model's folder, where fine-tuning finds it."""
        self.save(model / TOKENIZER_FILE)


@final
class ByteTokenizer(Tokenizer):
    """The 256 byte values of UTF-8 and one end of document.

    >>> ByteTokenizer().encode("né")
    [110, 195, 169]
    """

    vocab_size = BYTE_VALUES + 1
    description = "bytes"

    def encode_all(self, texts: Sequence[str]) -> list[Int32[Tensor, " N"]]:
        """The UTF-8 bytes of each text."""
        return [
            # frombuffer accepts no empty buffer
            torch.frombuffer(bytearray(raw), dtype=torch.uint8).to(torch.int32)
            if (raw := text.encode())
            else torch.empty(0, dtype=torch.int32)
            for text in texts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of byte values."""
        return bytes(i for i in ids if i != self.end_of_document).decode(errors="replace")

    def to_json(self) -> str:
        """Its kind; it has no parameters."""
        return json.dumps({"kind": "bytes"})


@final
class BpeTokenizer(Tokenizer):
    """Byte-level byte-pair encoding; `train_bpe` makes one.

    Args:
        model: A `tokenizers.Tokenizer` of byte-level pairs without special tokens.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # The end of a document is ours, outside the model: text that spells a special token
        # would otherwise be encoded as one.
        self.vocab_size = model.get_vocab_size() + 1
        self.description = f"bpe-{self.vocab_size}"

    def encode_all(self, texts: Sequence[str]) -> list[Int32[Tensor, " N"]]:
        """The ids of each text."""
        for text in texts:
            text.encode()  # a lone surrogate would be dropped silently
        return [torch.tensor(e.ids, dtype=torch.int32) for e in self._model.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        text: str = self._model.decode([i for i in ids if i != self.end_of_document])
        return text

    def to_json(self) -> str:
        """Its kind and the learnt model."""
        return json.dumps({"kind": "bpe", "model": self._model.to_str()})


def train_bpe(texts: Sequence[str], vocab_size: int) -> BpeTokenizer:
    """Learn byte pairs; the same texts and versions give the same pairs.

    Args:
        texts: Training documents; a sample of 4 million characters, an equal part of the
            beginning of each document, is learnt from.
        vocab_size: Ids in all, the end of a document included; fewer come out where the text has
            too few pairs.

    Returns:
        The tokeniser.

    Raises:
        ValueError: `vocab_size` leaves no room for a pair, or `tokenizers` is not installed.

    >>> train_bpe(["ab ab ab ab"], 258).encode("abab")
    [256, 256]
    """
    if vocab_size < BYTE_VALUES + 2:
        raise ValueError(
            f"vocab_size {vocab_size} leaves no room for a pair: byte-level BPE has 256 bytes and "
            'one end of document. Give at least 258, or tokenizer="bytes".'
        )
    library = _tokenizers()
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(_sample(texts), trainer)
    return BpeTokenizer(model)


def tokenizer_from_json(text: str) -> Tokenizer:
    """Make a tokeniser again from `Tokenizer.to_json`.

    Raises:
        ValueError: the text is of something else, or `tokenizers` is not installed.

    >>> tokenizer_from_json(ByteTokenizer().to_json()).description
    'bytes'
    """
    content = json.loads(text)
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind != "bpe":
        raise ValueError(f"kind={kind!r}: must be bytes or bpe")
    library = _tokenizers()
    try:
        return BpeTokenizer(library.Tokenizer.from_str(content.get("model")))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"its model is none: {error}") from error


def load_tokenizer(path: Path) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Raises:
        ValueError: it cannot be read; names the file.
    """
    try:
        return tokenizer_from_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. If it is damaged, copy it again from the run that "
            "trained the model."
        ) from error


def _sample(texts: Sequence[str]) -> list[str]:
    """The beginning of every text, as long for each as the budget allows."""
    budget, short = _TRAINING_CHARACTERS, sorted(map(len, texts))
    for done, length in enumerate(short):
        share = budget // (len(short) - done)
        if length > share:
            return [text[:share] for text in texts]
        budget -= length
    return list(texts)


def bpe_version() -> str:
    """The version of the library that learns and applies byte-level pairs."""
    return str(_tokenizers().__version__)


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError as error:
        raise ValueError(
            'tokenizer="bpe" needs the `tokenizers` package. Run: pip install '
            '"moebalance[train]", or choose tokenizer="bytes".'
        ) from error
