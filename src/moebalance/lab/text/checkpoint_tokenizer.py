"""The tokeniser in the folder of a model: Transformers' own kind, or one of ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Int32
from torch import Tensor

from moebalance.lab.text.tokens import TOKENIZER_FILE, Tokenizer, load_tokenizer

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokeniser."""
    return any((folder / name).is_file() for name in (TOKENIZER_FILE, *_FILES))


def has_other_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether a model's folder holds a tokeniser that is not this one."""
    ours = folder / TOKENIZER_FILE
    if ours.is_file():
        return load_tokenizer(ours).to_json() != tokenizer.to_json()
    return has_tokenizer(folder)


def load_checkpoint_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokeniser of a model's folder.

    Raises:
        ValueError: there is none, or it cannot be read, or it has no end of document.
    """
    if (folder / TOKENIZER_FILE).is_file():
        return load_tokenizer(folder / TOKENIZER_FILE)
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no tokeniser (none of {', '.join(_FILES)}): copy the model's own "
            'there. For a model that was trained on bytes, say [data] tokenizer = "bytes".'
        )
    from transformers import AutoTokenizer

    from moebalance.lab.models import refusing

    with refusing(f"The tokeniser in {folder} cannot be read"):
        model = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    return CheckpointTokenizer(model)


@final
class CheckpointTokenizer(Tokenizer):
    """A Transformers tokeniser.

    Text that spells a special token, such as `<|im_start|>`, becomes that token, so that rendered
    conversations can be trained on. Nothing is put before or after a text; documents are separated
    by the end of sequence.

    Args:
        model: a Transformers tokeniser with an `eos_token`.

    Raises:
        ValueError: it has no `eos_token`.
    """

    def __init__(self, model: Any) -> None:
        if model.eos_token_id is None:
            raise ValueError(
                f"The checkpoint's {type(model).__name__} has no eos_token to put between "
                "documents: set eos_token in its tokenizer_config.json."
            )
        self.model = model
        self.vocab_size = len(model)
        self.description = f"checkpoint-{self.vocab_size}"

    @property
    def end_of_document(self) -> int:
        """The id of the end of sequence."""
        return int(self.model.eos_token_id)

    def encode_all(self, texts: Sequence[str]) -> list[Int32[Tensor, " N"]]:
        """The ids of each text."""
        if not texts:
            return []
        # verbose=False: long texts are cut into sequences later, so their length is no mistake.
        found = self.model(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [torch.tensor(ids, dtype=torch.int32) for ids in found]

    def render(self, messages: list[Any]) -> str:
        """The text of a conversation under the checkpoint's chat template."""
        if getattr(self.model, "chat_template", None) is None:
            return super().render(messages)
        text: str = self.model.apply_chat_template(messages, tokenize=False)
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        text: str = self.model.decode([i for i in ids if i != self.end_of_document])
        return text

    def to_json(self) -> str:
        """A digest that tells it apart; it is read again from the checkpoint, not from here."""
        fast = getattr(self.model, "backend_tokenizer", None)
        content = (
            json.dumps(self.model.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
        )
        digest = hashlib.sha256(content.encode()).hexdigest()
        return json.dumps({"kind": "checkpoint", "eos": self.end_of_document, "sha256": digest})

    def save_beside(self, model: Path) -> None:
        """Write the tokeniser's own files into a model's folder."""
        self.model.save_pretrained(model)
