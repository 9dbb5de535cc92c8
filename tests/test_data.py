"""Data for experiments: split, packing, hash and cache, and the default text at its full size."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from moebalance.lab.recipe import DataSpec, Recipe
from moebalance.lab.text.batches import TokenDataset, ordered_indices
from moebalance.lab.text.corpus import Corpus, Document, load_corpus
from moebalance.lab.text.data import TextData, cut, join, load_data, split_documents
from moebalance.lab.text.python_text import DOMAINS
from moebalance.lab.text.tokens import train_bpe


@pytest.fixture(scope="module")
def python_data() -> TextData:
    return load_data(DataSpec())


def small(folder: Path, **changes: object) -> DataSpec:
    return DataSpec(**({"source": str(folder), "seq_len": 16} | changes))


# --- the default text -----------------------------------------------------------------------------


@pytest.mark.skipif(
    platform.python_version() != "3.11.7", reason="the text is that of one version of Python"
)
def test_the_default_text_is_the_text_of_the_committed_results(python_data):
    """Its hash stands in the header of every committed log."""
    whole = "e14d25823fc4fc9bfcb0ddd3e425a60a2e7e55b2ff1633d27cee52864c3c6208"
    assert python_data.sha256 == whole
    assert python_data.header()["sha256"] == whole


def test_default_domains_are_large_enough(python_data):
    assert python_data.domains == DOMAINS
    assert min(python_data.train_tokens.values()) > 600_000
    assert min(python_data.val_tokens.values()) > 60_000


def test_default_domains_differ_in_their_bytes(python_data):
    """Kullback–Leibler divergence between the byte frequencies of any two domains, in nats."""
    counts = torch.stack(
        [torch.bincount(tokens.flatten(), minlength=257) + 1.0 for tokens in by_domain(python_data)]
    )
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    kl = (log_p.exp()[:, None] * (log_p[:, None] - log_p[None])).sum(-1)
    assert kl[~torch.eye(len(kl), dtype=torch.bool)].min() > 0.1

    # A unigram classifier learnt on training text names the domain of held-out sequences.
    held_out = python_data.validation
    guesses = torch.stack([log_p[:, ids].sum(-1).argmax() for ids in held_out.tokens[::7].long()])
    assert (guesses == held_out.domains[::7]).float().mean() > 0.85


def by_domain(data: TextData) -> list[Tensor]:
    return [data.train.tokens[data.train.domains == d] for d in range(len(data.domains))]


def test_sequential_loader_reads_the_order(python_data):
    data = python_data.train
    order = ordered_indices(data.domains, batch_size=4, num_batches=6, batching="one-domain")
    view = data.in_order(order)
    assert isinstance(view, TokenDataset)
    assert len(view) == 24
    loader = DataLoader(view, batch_size=4, sampler=SequentialSampler(view))
    for batch, indices in zip(loader, order.view(6, 4), strict=True):
        assert torch.equal(batch["input_ids"], data.tokens[indices].long())
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["domain"].unique().numel() == 1
        assert batch["domain"].dtype == batch["input_ids"].dtype == torch.int64


# --- split ----------------------------------------------------------------------------------------


def corpus_of(sizes: dict[str, list[int]]) -> Corpus:
    documents = tuple(
        Document(domain, f"{number:03d}", "x" * size)
        for domain, each in sizes.items()
        for number, size in enumerate(each)
    )
    return Corpus(documents, tuple(sizes), "")


def test_no_document_stands_on_both_sides(folder):
    corpus = load_corpus(DataSpec("python"))
    train, held_out = split_documents(corpus, validation=0.1, seed=0)
    assert sorted(train + held_out) == sorted(corpus.documents)
    assert not set(train) & set(held_out)
    assert not {d.text for d in train} & {d.text for d in held_out}
    for domain in corpus.domains:
        size = Counter(
            {
                part: sum(len(d.text) for d in docs if d.domain == domain)
                for part, docs in (("train", train), ("held out", held_out))
            }
        )
        assert size["held out"] / size.total() == pytest.approx(0.1, abs=0.01)


@given(
    sizes=st.lists(st.integers(1, 400), min_size=2, max_size=20),
    validation=st.floats(0.001, 0.5),
    seed=st.integers(0, 5),
)
def test_neither_side_is_ever_empty(sizes, validation, seed):
    corpus = corpus_of({"a": sizes, "b": [5, 5]})
    train, held_out = split_documents(corpus, validation=validation, seed=seed)
    assert len(train) + len(held_out) == len(corpus.documents)
    assert {d.domain for d in train} == {d.domain for d in held_out} == {"a", "b"}


def test_split_depends_on_its_seed_and_nothing_else():
    corpus = corpus_of({"a": [10] * 50})
    first = split_documents(corpus, validation=0.2, seed=0)
    assert first == split_documents(corpus, validation=0.2, seed=0)
    assert first != split_documents(corpus, validation=0.2, seed=1)


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match="domain 'a' has one document, '000'"):
        split_documents(corpus_of({"a": [10]}), validation=0.1, seed=0)


# --- packing --------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8), seq_len=st.integers(2, 20))
def test_packing_keeps_every_token_in_order(lengths, seq_len):
    texts = [torch.randint(0, 256, (n,), dtype=torch.int32) for n in lengths]
    sequences, left_over = cut(join(texts, 256), seq_len)
    total = sum(lengths) + len(lengths) - 1
    assert sequences.numel() + left_over == total
    assert left_over < seq_len
    joined = [t for text in texts for t in [*text.tolist(), 256]][:-1]
    assert sequences.flatten().tolist() == joined[: sequences.numel()]


# --- the whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_load_data_accounts_for_every_byte(folder, tokenizer):
    data = load_data(small(folder, tokenizer=tokenizer, vocab_size=280))
    corpus = load_corpus(DataSpec(str(folder)))
    train, held_out = split_documents(corpus, validation=0.1, seed=0)
    for part, docs, tokens in (
        (data.train, train, data.train_tokens),
        (data.validation, held_out, data.val_tokens),
    ):
        for label, domain in enumerate(corpus.domains):
            texts = [d.text for d in docs if d.domain == domain]
            ids = part.tokens[part.domains == label].flatten().tolist()
            assert len(ids) == tokens[domain]
            text = data.tokenizer.decode(ids)
            assert "".join(texts).startswith(text)
            assert len("".join(texts)) - len(text) < 16 * 40  # less than a sequence is left over
    size = sum(len(d.text.encode()) for d in held_out)
    encoded = sum(len(data.tokenizer.encode(d.text)) for d in held_out)
    assert data.bytes_per_token == pytest.approx(size / encoded)
    assert (data.bytes_per_token == 1.0) == (tokenizer == "bytes")
    assert data.header()["sha256"] == data.sha256
    assert data.header()["seq_len"] == 16


def test_data_hash_covers_text_split_tokenizer_and_length(folder):
    same = load_data(small(folder)).sha256
    assert load_data(small(folder)).sha256 == same
    others = [
        load_data(small(folder, **change)).sha256
        for change in (
            {"seq_len": 17},
            {"split_seed": 1},
            {"tokenizer": "bpe", "vocab_size": 280},
            {"domains": ("letters", "digits")},
        )
    ]
    assert len({same, *others}) == 5
    (folder / "letters" / "3.txt").write_text("other text " * 40)
    assert load_data(small(folder)).sha256 != same


def test_bpe_learns_from_training_documents_only(folder, monkeypatch):
    learnt: list[str] = []

    def spy(texts: list[str], vocab_size: int) -> object:
        learnt.extend(texts)
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr("moebalance.lab.text.data.train_bpe", spy)
    load_data(small(folder, tokenizer="bpe", vocab_size=280))
    train, _ = split_documents(load_corpus(DataSpec(str(folder))), validation=0.1, seed=0)
    assert learnt == [document.text for document in train]


def test_cache_gives_the_same_data_and_survives_damage(folder, tmp_path, monkeypatch, caplog):
    spec = small(folder, tokenizer="bpe", vocab_size=280)
    cache = tmp_path / "cache"
    first = load_data(spec, cache_dir=cache)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("moebalance.lab.text.data.train_bpe", None)  # must not be needed
        second = load_data(spec, cache_dir=cache)
    assert second.sha256 == first.sha256 == load_data(spec).sha256
    assert torch.equal(second.train.tokens, first.train.tokens)
    file.write_bytes(file.read_bytes()[:100])
    assert load_data(spec, cache_dir=cache).sha256 == first.sha256
    assert "damaged" in caplog.text
    (folder / "letters" / "3.txt").write_text("other text " * 40)
    load_data(spec, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


def test_a_vocabulary_the_text_cannot_fill_is_logged(folder, caplog):
    data = load_data(small(folder, tokenizer="bpe", vocab_size=9000))
    assert data.tokenizer.vocab_size < 9000
    assert "of the 9000 asked for" in caplog.text


def test_too_little_text_names_the_domain_and_the_part(folder):
    with pytest.raises(ValueError, match=r"has 4\d\d tokens of validation text, fewer than"):
        load_data(small(folder, seq_len=500))
    with pytest.raises(ValueError, match=r"domain 'digits' has \d+ tokens of training text"):
        load_data(small(folder, seq_len=5000))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"tokenizer": "byte"}, "Did you mean 'bytes'"),
        ({"tokenizer": 3}, "tokenizer=3. Possible: bytes, bpe, checkpoint"),
        ({"source": 3}, "source=3: must be text, not int"),
        ({"seq_len": 1}, "seq_len=1: must be at least 2"),
        ({"seq_len": 12.5}, "seq_len=12.5: must be an integer, not float"),
        ({"seq_len": True}, "seq_len=True: must be an integer"),
        ({"split_seed": "a"}, "split_seed='a': must be an integer"),
        ({"validation": 0}, "validation=0: must be greater than 0"),
        ({"validation": 0.6}, "at most 0.5"),
        ({"validation": "a"}, "validation='a': must be a number, not str"),
        ({"max_bytes_per_domain": 0}, "max_bytes_per_domain=0: must be at least 1"),
        ({"max_bytes_per_domain": "1MB"}, "max_bytes_per_domain='1MB'"),
        ({"domains": "code"}, "domains='code': must be a list, even for one"),
        ({"domains": []}, r"domains=\[\]: give at least one"),
        ({"domains": ["a", "a"]}, "give each one once"),
        ({"extensions": [1]}, r"extensions\.0=1: must be text"),
    ],
)
def test_recipe_errors(change, match):
    with pytest.raises(ValueError, match=match) as refused:
        Recipe.parse({"model": {"architecture": "mixtral"}, "data": change}, source="r.toml")
    assert str(refused.value).startswith("r.toml: [data] ")


def test_what_is_made_in_code_is_checked_too():
    with pytest.raises(ValueError, match=r"seq_len\n.*greater than or equal to 2"):
        DataSpec(seq_len=1)
    with pytest.raises(ValueError, match=r"seq_len\n.*greater than or equal to 2"):
        replace(DataSpec(), seq_len=1)


def test_recipe_lists_become_tuples():
    assert hash(DataSpec(domains=["code", "prose"])) == hash(DataSpec(domains=("code", "prose")))
