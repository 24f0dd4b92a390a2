"""Packing: no token is lost, moved or counted twice between a document and its rows, as a table or as a stream."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from infini_hf.data import source_digest
from infini_hf.data.base_rows import train_tokenizer
from infini_hf.data.booksum import load_booksum, summarization_rows
from infini_hf.data.documents import load_documents
from infini_hf.data.packing import pack_documents

datasets = pytest.importorskip("datasets")

NOVELS = Path(__file__).parents[2] / "shared" / "corpus" / "novels"
PROSE = "The old house stood at the end of the lane, and nobody had lived there for 12 years. "
# One shorter than a row, one of many rows, one of a few words, and one that ends with a space.
BOOKS = [PROSE[:30], PROSE * 6, "12 years", PROSE[::-1] + " "]
SEGMENT, SEGMENTS = 8, 2
ROW = SEGMENT * SEGMENTS


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=[True, False], ids=["stream", "table"])
def streaming(request):
    return request.param


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer([PROSE], vocab_size=300)


@pytest.fixture(params=["bos eos", "eos", "bos", "none", "one for both"])
def tokenizer(request, trained):
    """A tokenizer with both special tokens, one of them, none, or one token that is both."""
    return with_special_tokens(trained, request.param)


def with_special_tokens(trained, which):
    tokenizer = train_tokenizer([PROSE], vocab_size=300)
    tokenizer.add_tokens(["<s>", "</s>"], special_tokens=True)
    if which != "one for both":
        tokenizer.bos_token = "<s>" if "bos" in which else None
        tokenizer.eos_token = "</s>" if "eos" in which else None
    assert tokenizer.vocab_size == trained.vocab_size
    return tokenizer


def dataset_of(texts, streaming, shards=2):
    table = datasets.Dataset.from_dict({"text": texts, "source": ["somewhere"] * len(texts)})
    return table.to_iterable_dataset(num_shards=min(shards, len(texts))) if streaming else table


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def framed(tokenizer, text):
    """A document by hand: BOS, its tokens, EOS, as far as there are such."""
    ids = [tokenizer.bos_token_id, *plain(tokenizer, text), tokenizer.eos_token_id]
    return [token for token in ids if token is not None]


def joined_by_hand(tokenizer, texts):
    """The stream of all documents, and where in it each begins."""
    ids, starts = [], []
    for text in texts:
        starts.append(len(ids))
        document = framed(tokenizer, text)
        ids += document[1:] if tokenizer.bos_token_id == tokenizer.eos_token_id else document
    return ids, starts


# Documents apart.


def test_the_rows_of_a_document_put_together_are_the_document(tokenizer, streaming):
    rows = pack_documents(dataset_of(BOOKS, streaming), tokenizer, SEGMENT, SEGMENTS)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    assert set(rows.column_names) == {"input_ids", "labels", "document", "part"}
    rows = list(rows)
    assert [row["document"] for row in rows] == sorted(row["document"] for row in rows)
    for number, text in enumerate(BOOKS):
        mine = [row for row in rows if row["document"] == number]
        whole = framed(tokenizer, text)
        whole = whole[:-1] if len(whole) % ROW == 1 else whole
        assert list(itertools.chain(*(row["input_ids"] for row in mine))) == whole
        assert [row["part"] for row in mine] == list(range(len(mine)))
        assert {len(row["input_ids"]) for row in mine[:-1]} <= {ROW}
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert len(rows) > 8


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 2, 5])
def test_a_last_row_of_too_few_tokens_is_left_out(trained, streaming, join, extra):
    tokenizer = with_special_tokens(trained, "eos")
    text = tokenizer.decode(plain(tokenizer, PROSE * 2)[: 2 * ROW - 1 + extra])
    assert len(framed(tokenizer, text)) == 2 * ROW + extra
    for least in (2, 5, ROW):
        rows = list(
            pack_documents(dataset_of([text], streaming, 1), tokenizer, SEGMENT, SEGMENTS, join, min_tokens=least)
        )
        expected = [ROW, ROW, *([extra] if extra >= least else [])]
        assert [len(row["input_ids"]) for row in rows] == expected


def test_a_document_of_one_token_gives_no_row_and_keeps_its_number(trained, streaming):
    tokenizer = with_special_tokens(trained, "none")
    assert len(plain(tokenizer, "1")) == 1
    rows = pack_documents(dataset_of(["1", "12 years", "2"], streaming), tokenizer, SEGMENT, SEGMENTS)
    assert [(row["document"], row["part"]) for row in rows] == [(1, 0)]


def test_the_tokenizer_adds_nothing_itself_and_does_not_complain_of_length(trained, streaming, monkeypatch):
    tokenizer = with_special_tokens(trained, "bos eos")
    # A tokenizer that would put a BOS of its own before everything, as Llama's does.
    tokenizer.backend_tokenizer.post_processor = processor_that_adds(tokenizer, "<s>")
    assert tokenizer("12")["input_ids"][0] == tokenizer.bos_token_id
    expected = framed(tokenizer, PROSE * 2)
    tokenizer.model_max_length = 4
    warnings = []
    monkeypatch.setattr(transformers.tokenization_utils_base.logger, "warning", lambda *args: warnings.append(args))
    for join in (False, True):
        rows = list(pack_documents(dataset_of([PROSE * 2], streaming), tokenizer, SEGMENT, SEGMENTS, join))
        assert list(itertools.chain(*(row["input_ids"] for row in rows))) == expected
    assert not warnings
    tokenizer(PROSE)
    assert len(warnings) == 1, "the warning would not have been seen"


def processor_that_adds(tokenizer, token):
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))]
    )


# Documents joined.


def test_joined_rows_are_one_stream_with_its_starts(tokenizer, streaming):
    documents = dataset_of(BOOKS, streaming)
    if tokenizer.eos_token_id is None:
        with pytest.raises(ValueError, match=r"join=True: the tokenizer has no EOS .* set tokenizer.eos_token"):
            pack_documents(documents, tokenizer, SEGMENT, SEGMENTS, join=True)
        return
    rows = pack_documents(documents, tokenizer, SEGMENT, SEGMENTS, join=True)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = list(rows)
    ids, starts = joined_by_hand(tokenizer, BOOKS)
    assert list(itertools.chain(*(row["input_ids"] for row in rows))) == ids
    assert [row["part"] * ROW + start for row in rows for start in row["starts"]] == starts
    assert [(row["document"], row["part"]) for row in rows] == [(0, part) for part in range(len(rows))]
    assert {len(row["input_ids"]) for row in rows[:-1]} == {ROW}
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_a_row_can_hold_many_documents(trained):
    tokenizer = with_special_tokens(trained, "bos eos")
    rows = list(pack_documents(dataset_of(["1", "2", "3", "4"], False), tokenizer, 7, 1, join=True))
    assert [row["starts"] for row in rows] == [[0, 3, 6], [2]]


# Streams.


@pytest.mark.parametrize("join", [False, True])
def test_a_stream_resumes_at_the_next_row_from_any_point(trained, tmp_path, join):
    for number, text in enumerate(BOOKS):
        (tmp_path / f"{number}.txt").write_text(text)

    def rows():
        documents = load_documents(tmp_path, where=lambda row: len(row["text"]) > 10, limit=3)
        return pack_documents(documents, trained, SEGMENT, SEGMENTS, join)

    whole = list(rows())
    for taken in range(len(whole)):
        stream, resumed = rows(), rows()
        before = list(itertools.islice(stream, taken))
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        assert before + list(resumed) == whole


def test_a_stream_tokenises_no_more_than_it_is_asked_for(trained):
    read = []

    def documents():
        for number in range(100):
            read.append(number)
            yield {"text": PROSE}

    for join in (False, True):
        read.clear()
        stream = datasets.IterableDataset.from_generator(documents)
        next(iter(pack_documents(stream, trained, SEGMENT, SEGMENTS, join)))
        assert len(read) <= 2


def test_workers_number_their_documents_apart(trained, tmp_path):
    for number, text in enumerate(BOOKS):
        (tmp_path / f"{number}.txt").write_text(text)
    rows = pack_documents(load_documents(tmp_path), trained, SEGMENT, SEGMENTS)
    found = {}
    for row in torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2):
        assert row["part"] == len(found.setdefault(row["document"], [])) // ROW
        found[row["document"]] += row["input_ids"]
    assert sorted(found.values()) == sorted(framed(trained, text) for text in BOOKS)


def test_joined_rows_are_not_shared_out_to_workers(trained, tmp_path, monkeypatch):
    for number, text in enumerate(BOOKS):
        (tmp_path / f"{number}.txt").write_text(text)
    folder, file = (load_documents(source) for source in (tmp_path, tmp_path / "1.txt"))
    expected = [list(pack_documents(source, trained, SEGMENT, SEGMENTS, join=True)) for source in (folder, file)]

    def read_in_worker(documents, workers):
        info = SimpleNamespace(id=0, num_workers=workers, seed=0, dataset=None)
        with monkeypatch.context() as worker:
            worker.setattr(torch.utils.data, "get_worker_info", lambda: info)
            return list(pack_documents(documents, trained, SEGMENT, SEGMENTS, join=True))

    with pytest.raises(ValueError, match="2 DataLoader workers: joined documents are one stream"):
        read_in_worker(folder, 2)
    assert [read_in_worker(folder, 1), read_in_worker(file, 2)] == expected


def test_packing_does_not_depend_on_what_was_packed_before(trained, streaming):
    rows = [list(pack_documents(dataset_of(BOOKS, streaming), trained, SEGMENT, SEGMENTS, True)) for _ in range(2)]
    other = list(pack_documents(dataset_of(BOOKS[::-1], streaming), trained, SEGMENT, SEGMENTS, True))
    assert rows[0] == rows[1] != other
    longer = list(pack_documents(dataset_of(BOOKS, streaming), trained, 2 * SEGMENT, SEGMENTS, True))
    assert longer[0]["input_ids"] == rows[0][0]["input_ids"] + rows[0][1]["input_ids"]


@pytest.mark.skipif(not NOVELS.exists(), reason="the corpus is not here")
def test_a_novel_of_the_corpus_is_packed_whole(trained):
    documents = load_documents(min((NOVELS / "validation").iterdir(), key=lambda file: file.stat().st_size))
    (text,) = (row["text"] for row in documents)
    rows = list(pack_documents(documents, trained, 2048, 4))
    ids = np.concatenate([row["input_ids"] for row in rows])
    assert np.array_equal(ids, framed(trained, text))
    assert {len(row["input_ids"]) for row in rows[:-1]} == {8192}


# Refusals of packing.


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 2), "segment_length=0: must be at least 1"),
        ((8, 0), "segments_per_row=0: must be at least 1"),
        ((8.0, 2), "segment_length=8.0: must be a whole number"),
        ((1, 1), "segment_length=1, segments_per_row=1: a row holds 1 tokens, fewer than min_tokens=2"),
        ((8, 2, False, 1), "min_tokens=1: must be at least 2"),
        ((8, 2, False, 17), "a row holds 16 tokens, fewer than min_tokens=17"),
    ],
)
def test_a_row_of_an_impossible_size_is_refused(trained, numbers, message):
    with pytest.raises(ValueError, match=message):
        pack_documents(dataset_of(BOOKS, False), trained, *numbers)


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("text", ["", " \n", None])
def test_an_empty_document_is_named(trained, streaming, join, text):
    with pytest.raises(ValueError, match=r"document 2 is empty; leave it out, as load_documents\(\.\.\., drop_empty"):
        list(pack_documents(dataset_of(["a b", "c d", text], streaming, 1), trained, SEGMENT, SEGMENTS, join))


def test_what_is_not_a_dataset_of_documents_is_refused(trained):
    table = dataset_of(BOOKS, False)
    for documents, kind, message in (
        (BOOKS, TypeError, "documents is a list: pass a dataset"),
        (datasets.DatasetDict(train=table, test=table), TypeError, "has the splits 'train', 'test': pass one"),
        (table.rename_column("text", "body"), ValueError, r"has the columns \['body', 'source'\]: rename"),
    ):
        with pytest.raises(kind, match=message):
            pack_documents(documents, trained, SEGMENT, SEGMENTS)
    with pytest.raises(TypeError, match="tokenizer is a str: pass a tokenizer"):
        pack_documents(table, "gpt2", SEGMENT, SEGMENTS)


# What is kept on the disk.


@pytest.mark.parametrize("join", [False, True])
def test_rows_of_another_version_of_the_code_are_made_again(trained, tmp_path, monkeypatch, join):
    """`datasets` knows a function by its name: what its code was before came back from the disk."""
    book, code = tmp_path / "book.txt", tmp_path / "code"
    book.write_text(PROSE * 6, encoding="utf-8")
    tokenizer = with_special_tokens(trained, "bos eos")

    def made():
        documents = load_documents(book, streaming=False)
        rows = pack_documents(documents, tokenizer, SEGMENT, SEGMENTS, join=join)
        return documents._fingerprint, rows._fingerprint

    first = made()
    assert made() == first
    code.mkdir()
    (code / "packing.py").write_text("another", encoding="utf-8")
    monkeypatch.setattr(source_digest, "FOLDER", code)
    assert not set(first) & set(made())


def test_pairs_of_another_version_of_the_code_are_made_again(trained, tmp_path, monkeypatch):
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(json.dumps({"text": PROSE, "summary": PROSE[:30]}) + "\n", encoding="utf-8")
    tokenizer = with_special_tokens(trained, "bos eos")

    def made():
        pairs = load_booksum(lines, drop_empty=True)
        return pairs._fingerprint, summarization_rows(pairs, tokenizer)._fingerprint

    first = made()
    assert made() == first
    monkeypatch.setattr(source_digest, "FOLDER", tmp_path / "none")
    assert not set(first) & set(made())
