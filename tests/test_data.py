"""Text for experiments: documents, split, tokens, packing and the order of micro-batches."""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from moebalance.experiments.batches import TokenDataset, ordered_indices
from moebalance.experiments.corpus import Corpus, Document, load_corpus
from moebalance.experiments.data import DataSpec, TextData, load_data, pack, split_documents
from moebalance.experiments.python_text import DOMAINS, python_text, split_docstrings
from moebalance.experiments.tokens import ByteTokenizer, load_tokenizer, train_bpe

# Three domains of very unequal size, sequence labels as a packed data set has them.
LABELS = torch.arange(3).repeat_interleave(torch.tensor([500, 120, 37]))


@pytest.fixture(scope="module")
def python_data() -> TextData:
    return load_data(DataSpec())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two domains in sub-folders and one of plain files; every file is different text."""
    root = tmp_path / "texts"
    for domain, word in (("letters", "abc "), ("digits", "123 "), ("", "!? ")):
        (root / domain).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            (root / domain / f"{number}.txt").write_text(f"file {number} " + word * 100)
    return root


def small(folder: Path, **changes: object) -> DataSpec:
    return DataSpec(**({"source": str(folder), "seq_len": 16} | changes))


# --- the text every Python ships -----------------------------------------------------------------


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


# --- corpora -------------------------------------------------------------------------------------


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


def hide(monkeypatch, package: str) -> None:
    """Make a package look not installed to code that imports it lazily."""
    found = importlib.import_module

    def missing(name: str) -> object:
        if name == package:
            raise ModuleNotFoundError(name)
        return found(name)

    monkeypatch.setattr("importlib.import_module", missing)


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


# --- split ---------------------------------------------------------------------------------------


def corpus_of(sizes: dict[str, list[int]]) -> Corpus:
    documents = tuple(
        Document(domain, f"{number:03d}", "x" * size)
        for domain, each in sizes.items()
        for number, size in enumerate(each)
    )
    return Corpus(documents, tuple(sizes), "")


def test_no_document_stands_on_both_sides(folder):
    corpus = load_corpus("python")
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


# --- tokens --------------------------------------------------------------------------------------

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


# --- packing -------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8), seq_len=st.integers(2, 20))
def test_packing_keeps_every_token_in_order(lengths, seq_len):
    texts = [torch.randint(0, 256, (n,), dtype=torch.int32) for n in lengths]
    sequences, left_over = pack(texts, seq_len=seq_len, end_of_document=256)
    total = sum(lengths) + len(lengths) - 1
    assert sequences.numel() + left_over == total
    assert left_over < seq_len
    joined = [t for text in texts for t in [*text.tolist(), 256]][:-1]
    assert sequences.flatten().tolist() == joined[: sequences.numel()]


# --- the order of micro-batches ------------------------------------------------------------------


def shares(order: Tensor) -> list[int]:
    return LABELS[order].bincount(minlength=3).tolist()


def test_one_domain_batches_hold_one_domain():
    order = ordered_indices(LABELS, batch_size=4, num_batches=50, batching="one-domain")
    assert all(len(batch.unique()) == 1 for batch in LABELS[order].view(50, 4))
    firsts = LABELS[order].view(50, 4)[:, 0].tolist()
    assert len({tuple(firsts[i : i + 3]) for i in range(0, 48, 3)}) > 4  # shuffled, not in turn


def test_mixed_batches_are_mixed():
    order = ordered_indices(LABELS, batch_size=16, num_batches=96, batching="mixed")
    counts = torch.stack([b.bincount(minlength=3) for b in LABELS[order].view(96, 16)]).double()
    assert (counts > 0).all(dim=1).float().mean() > 0.95
    # As spread as independent draws: variance n p (1 − p), within the noise of 96 batches.
    assert counts.var(dim=0).mean() == pytest.approx(16 * 2 / 9, rel=0.3)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_both_batchings_read_the_same_sequences(batch_size):
    """After whole rounds (8 micro-batches a domain) with equal weights."""
    orders = [
        ordered_indices(LABELS, batch_size=batch_size, num_batches=72, batching=batching, seed=3)
        for batching in ("mixed", "one-domain")
    ]
    assert shares(orders[0]) == shares(orders[1]) == [24 * batch_size] * 3
    assert torch.equal(orders[0].sort().values, orders[1].sort().values)


@pytest.mark.parametrize("batching", ["mixed", "one-domain"])
def test_proportional_weights_follow_the_sizes(batching):
    sizes = LABELS.bincount().double()
    order = ordered_indices(
        LABELS, batch_size=4, num_batches=2400, batching=batching, domain_weights="proportional"
    )
    seen = torch.tensor(shares(order)).double() / len(order)
    assert torch.allclose(seen, sizes / sizes.sum(), atol=0.01)


@pytest.mark.parametrize("batching", ["mixed", "one-domain"])
@pytest.mark.parametrize("domain_weights", ["equal", "proportional"])
def test_order_is_fixed_by_the_seed_and_begins_a_longer_one(batching, domain_weights):
    def order(num_batches: int, seed: int) -> Tensor:
        return ordered_indices(
            LABELS,
            batch_size=4,
            num_batches=num_batches,
            batching=batching,
            seed=seed,
            domain_weights=domain_weights,
        )

    long = order(101, 0)
    assert len(long) == 404
    assert torch.equal(long, order(101, 0))
    assert not torch.equal(long, order(101, 1))
    # 10 steps of 3 micro-batches, 30 of 1, or the first 30 of a longer run: the same order.
    assert torch.equal(long[:120], order(30, 0))


@pytest.mark.parametrize("batching", ["mixed", "one-domain"])
def test_no_sequence_returns_before_its_domain_is_used_up(batching):
    order = ordered_indices(LABELS, batch_size=4, num_batches=300, batching=batching)
    for domain, size in enumerate(LABELS.bincount().tolist()):
        drawn = order[LABELS[order] == domain]
        passes = [part.tolist() for part in drawn.split(size)]
        assert all(len(set(part)) == len(part) for part in passes)
        assert len(passes) < 2 or passes[0] != passes[1]


def test_order_ignores_the_global_random_state():
    first = ordered_indices(LABELS, batch_size=4, num_batches=9)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(first, ordered_indices(LABELS, batch_size=4, num_batches=9))
    assert torch.equal(before, torch.get_rng_state())


def test_a_domain_without_sequences_gets_no_turn():
    labels = torch.tensor([0, 0, 2, 2])
    order = ordered_indices(labels, batch_size=2, num_batches=16, batching="one-domain")
    assert labels[order].bincount().tolist() == [16, 0, 16]


def test_order_errors():
    with pytest.raises(ValueError, match="Did you mean 'one-domain'"):
        ordered_indices(LABELS, batch_size=1, num_batches=1, batching="one_domain")
    with pytest.raises(ValueError, match="domain_weights 'same' is unknown"):
        ordered_indices(LABELS, batch_size=1, num_batches=1, domain_weights="same")
    with pytest.raises(ValueError, match="batch_size is 0"):
        ordered_indices(LABELS, batch_size=0, num_batches=1)
    with pytest.raises(ValueError, match="num_batches is -1"):
        ordered_indices(LABELS, batch_size=1, num_batches=-1)
    with pytest.raises(ValueError, match="no sequences"):
        ordered_indices(LABELS[:0], batch_size=1, num_batches=1)


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


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_load_data_accounts_for_every_byte(folder, tokenizer):
    data = load_data(small(folder, tokenizer=tokenizer, vocab_size=280))
    corpus = load_corpus(str(folder))
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

    monkeypatch.setattr("moebalance.experiments.data.train_bpe", spy)
    load_data(small(folder, tokenizer="bpe", vocab_size=280))
    train, _ = split_documents(load_corpus(str(folder)), validation=0.1, seed=0)
    assert learnt == [document.text for document in train]


def test_cache_gives_the_same_data_and_survives_damage(folder, tmp_path, monkeypatch, caplog):
    spec = small(folder, tokenizer="bpe", vocab_size=280)
    cache = tmp_path / "cache"
    first = load_data(spec, cache_dir=cache)
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("moebalance.experiments.data.train_bpe", None)  # must not be needed
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
    ("change", "error", "match"),
    [
        ({"tokenizer": "byte"}, ValueError, "Did you mean 'bytes'"),
        ({"tokenizer": 3}, TypeError, "tokenizer is 3"),
        ({"seq_len": 1}, ValueError, "seq_len is 1"),
        ({"seq_len": 12.5}, TypeError, "seq_len is 12.5; give a value of type int"),
        ({"seq_len": True}, TypeError, "seq_len is True"),
        ({"validation": 0}, ValueError, "validation is 0"),
        ({"validation": 0.6}, ValueError, "up to 0.5"),
        ({"validation": "a"}, TypeError, "validation is 'a'; give a value of type float"),
        ({"max_bytes_per_domain": 0}, ValueError, "max_bytes_per_domain is 0"),
        ({"max_bytes_per_domain": "1MB"}, TypeError, "max_bytes_per_domain is '1MB'"),
        ({"domains": "code"}, TypeError, "give a list of names"),
        ({"domains": []}, ValueError, "domains is"),
        ({"domains": ["a", "a"]}, ValueError, "each name once"),
        ({"extensions": [1]}, TypeError, "extensions is"),
    ],
)
def test_recipe_errors(change, error, match):
    with pytest.raises(error, match=match):
        DataSpec(**change)


def test_recipe_lists_become_tuples():
    assert hash(DataSpec(domains=["code", "prose"])) == hash(DataSpec(domains=("code", "prose")))
