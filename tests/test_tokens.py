"""Tokenizers: both decode what they encode, survive a file, and refuse what they cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missing import hide
from moebalance.lab.text.checkpoint_tokenizer import load_checkpoint_tokenizer
from moebalance.lab.text.python_text import python_text
from moebalance.lab.text.tokens import (
    TOKENIZER_FILE,
    ByteTokenizer,
    load_tokenizer,
    train_bpe,
)

BPE = train_bpe(["the cat sat on the mat, the end. naïve café\n"] * 3, 300)


@settings(max_examples=200)
@given(st.text())
def test_decode_inverts_encode(text):
    for tokenizer in (ByteTokenizer(), BPE):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text
        assert all(0 <= i < tokenizer.end_of_document for i in ids)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=lambda t: t.description)
def test_tokenizers_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.description == tokenizer.description
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.encode("the naïve cat ☃") == tokenizer.encode("the naïve cat ☃")


def test_bpe_is_deterministic_and_shorter_than_bytes():
    texts = [text for texts in python_text(("names",)).values() for text in texts.values()]
    first, second = train_bpe(texts, 400), train_bpe(texts, 400)
    assert first.to_json() == second.to_json()
    assert first.vocab_size == 400
    assert len(first.encode(texts[0])) < 0.8 * len(ByteTokenizer().encode(texts[0]))


def test_half_a_surrogate_pair_is_refused_by_both():
    for tokenizer in (ByteTokenizer(), BPE):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("\ud800")


def test_bpe_errors(monkeypatch):
    with pytest.raises(ValueError, match="vocab_size 257 leaves no room"):
        train_bpe(["a"], 257)
    hide(monkeypatch, "tokenizers")
    with pytest.raises(ValueError, match=r'needs the `tokenizers` package.*tokenizer="bytes"'):
        train_bpe(["a"], 300)


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "nonsense", "[" * 9999, '{"kind": "bpe", "model": "x"}', '{"kind": 3}']
)
def test_a_damaged_tokeniser_is_refused_by_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / TOKENIZER_FILE
    path.write_text(content)
    with pytest.raises(ValueError, match="cannot be read: ") as refused:
        load_checkpoint_tokenizer(tmp_path)
    assert str(path) in str(refused.value)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"json cannot be read"):
        load_checkpoint_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ['{"model": 3}', "[1]", "nonsense"])
def test_a_damaged_tokeniser_of_transformers_is_refused_by_its_folder(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<e>"}'
    )
    with pytest.raises(ValueError, match="cannot be read: ") as refused:
        load_checkpoint_tokenizer(tmp_path)
    assert str(tmp_path) in str(refused.value)
