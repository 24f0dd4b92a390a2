"""BookSum: both schemas give the same pairs, and a row begins with the very tokens that ask for the summary later."""

import json
import logging
from pathlib import Path

import pytest

from infini_hf.data.base_rows import train_tokenizer
from infini_hf.data.booksum import DEFAULT_PROMPT, load_booksum, summarization_prompt, summarization_rows
from infini_hf.data.collator import InfiniCollator

datasets = pytest.importorskip("datasets")

CORPUS = Path(__file__).parents[2] / "shared" / "corpus" / "booksum_arguments"
PROSE = "The old house stood at the end of the lane, and nobody had lived there for 12 years. "
# The fields of the hub's datasets; of chapters, `summary` is the JSON of an object.
CHAPTERS = [
    {
        "bid": 27681,
        "is_aggregate": number == 1,
        "source": source,
        "chapter_path": f"all_chapterized_books/27681-chapters/{number}.txt",
        "summary_path": f"finished_summaries/{source}/{number}.txt",
        "book_id": f"The House.chapter {number}",
        "summary_id": f"chapter {number}",
        "chapter": PROSE * (number + 2),
        "chapter_length": 17.0,
        "summary_name": f"Chapter {number}",
        "summary": json.dumps({"name": f"Chapter {number}", "summary": f"A house, {source}.", "analysis": ""}),
        "summary_text": f"A house, {source}." if number else None,
        "summary_analysis": None,
    }
    for number, source in enumerate(["sparknotes", "cliffnotes", "gradesaver"])
]
BOOKS = [
    {
        "bid": 1,
        "title": "The House",
        "text": PROSE * 5,
        "summary": [{"source": "sparknotes", "text": "A house."}, {"source": "wiki", "text": "An old, empty house."}],
    },
    {"bid": 2, "title": "The Lane", "text": PROSE * 4, "summary": [{"source": "wiki", "text": "A lane."}]},
]
CHAPTER_PAIRS = [
    {
        "id": f"27681:{chapter['book_id']}:{chapter['source']}",
        "text": chapter["chapter"],
        "summary": f"A house, {chapter['source']}.",
    }
    for chapter in CHAPTERS
]
BOOK_PAIRS = [
    {"id": "1:The House:sparknotes", "text": PROSE * 5, "summary": "A house."},
    {"id": "1:The House:wiki", "text": PROSE * 5, "summary": "An old, empty house."},
    {"id": "2:The Lane:wiki", "text": PROSE * 4, "summary": "A lane."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=[True, False], ids=["stream", "table"])
def streaming(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer whose BOS, EOS and padding are three tokens."""
    tokenizer = train_tokenizer([PROSE + DEFAULT_PROMPT], vocab_size=320)
    tokenizer.add_tokens(["<s>", "</s>"], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs_of(pairs, streaming=False):
    table = datasets.Dataset.from_list(pairs)
    return table.to_iterable_dataset() if streaming else table


# Pairs.


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("rows", "expected"), [(CHAPTERS, CHAPTER_PAIRS), (BOOKS, BOOK_PAIRS)], ids=["chap", "book"])
def test_both_schemas_give_a_pair_for_each_summary(tmp_path, streaming, suffix, rows, expected):
    source = tmp_path / f"rows.{suffix}"
    write_lines(source, rows) if suffix == "jsonl" else datasets.Dataset.from_list(rows).to_parquet(source)
    pairs = load_booksum(source, streaming=streaming)
    assert isinstance(pairs, datasets.IterableDataset if streaming else datasets.Dataset)
    assert pairs.column_names == ["id", "text", "summary"]
    assert list(pairs) == expected
    assert list(load_booksum(source, streaming=streaming, limit=2)) == expected[:2]


def test_the_longest_summary_of_a_book_can_stand_alone(tmp_path, streaming):
    source = write_lines(tmp_path / "books.jsonl", BOOKS)
    assert list(load_booksum(source, streaming=streaming, summaries="longest")) == BOOK_PAIRS[1:]


def test_the_longest_summary_of_a_text_is_found_in_rows_of_their_own(tmp_path):
    """As the chapters of the hub are stored."""
    said = {"sparknotes": "A house.", "wiki": "An old, empty house.", "gradesaver": "House"}
    rows = [
        {"book_id": title, "source": source, "chapter": PROSE * number, "summary_text": summary}
        for source, summary in said.items()
        for number, title in enumerate(("The House", "The Lane"), 1)
    ]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    pairs = load_booksum(source, summaries="longest")
    assert list(pairs["id"]) == ["The House:wiki", "The Lane:wiki"]
    assert list(pairs["text"]) == [PROSE, PROSE * 2]
    assert list(load_booksum(source, summaries="longest", limit=1)["id"]) == ["The House:wiki"]
    assert len(load_booksum(source)) == len(rows)


def test_a_folder_of_lines_is_read_by_split(tmp_path, streaming):
    for split, row in zip(("train", "validation"), BOOKS, strict=True):
        write_lines(tmp_path / f"{split}.jsonl", [row])
    assert list(load_booksum(tmp_path, split="validation", streaming=streaming)) == BOOK_PAIRS[2:]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "T", "summary": "S"}, ("row 0", "T", "S")),
        ({"bid": 3, "chapter": "T", "summary_text": "S", "summary": '{"summary": "s"}'}, ("3", "T", "S")),
        ({"bid": 3, "chapter": "T", "summary": json.dumps({"summary": ["S", "s"]})}, ("3", "T", "S\ns")),
        ({"bid": 3, "chapter": "T", "summary": json.dumps({"summary": "S"})}, ("3", "T", "S")),
        ({"bid": 3, "source": "x", "text": "T", "summary": ["S", "s"]}, ("3:x", "T", "S\ns")),
        ({"bid": 3, "title": "t", "text": "T", "summary": []}, ("3:t", "T", "")),
        ({"bid": 3, "chapter": "T", "summary": {"summary": ["S", "s"]}}, ("3", "T", "S\ns")),
        ({"bid": 3, "chapter": "T", "summary": '["S", "s"]'}, ("3", "T", "S\ns")),
        ({"bid": 3, "chapter": "T", "summary": '[{"source": "x", "text": "S"}]'}, ("3:x", "T", "S")),
        ({"bid": 3, "chapter": "T", "summary": "[sic] S"}, ("3", "T", "[sic] S")),
        ({"bid": 3, "chapter": 7, "text": "T", "summary": "S"}, ("3", "T", "S")),
        ({"bid": 3, "chapter": "Chapter 7", "text": "T", "summary": "S"}, ("3", "T", "S")),
        ({"bid": 3, "text": None, "summary": "S"}, ("3", "", "S")),
        ({"bid": 3, "text": "T", "summary": None}, ("3", "T", "")),
    ],
)
def test_summaries_are_read_in_every_form_they_come_in(tmp_path, streaming, row, expected):
    source = write_lines(tmp_path / "row.jsonl", [row])
    assert [tuple(pair.values()) for pair in load_booksum(source, streaming=streaming)] == [expected]


def test_pairs_without_text_or_summary_are_dropped_and_counted(tmp_path, streaming, caplog):
    rows = [{**BOOKS[0], "text": " "}, BOOKS[1], {**BOOKS[1], "summary": [{"source": "x", "text": "\n"}]}]
    source = write_lines(tmp_path / "books.jsonl", rows)
    assert len(list(load_booksum(source, streaming=streaming))) == 4
    assert not caplog.records
    assert list(load_booksum(source, streaming=streaming, drop_empty=True)) == BOOK_PAIRS[2:]
    counted = f"source='{source}', split='train': left out 3 of 4 pairs, 2 without a text and 1 without a summary"
    told = "pair '1:The House:sparknotes' is left out: it has no text; others may be, and are not told"
    assert [record.getMessage() for record in caplog.records] == [told if streaming else counted]
    assert list(load_booksum(source, streaming=streaming, drop_empty=True, limit=1)) == BOOK_PAIRS[2:]


def test_a_split_without_a_whole_pair_is_refused(tmp_path):
    source = write_lines(tmp_path / "books.jsonl", [{**BOOKS[1], "summary": None}])
    with pytest.raises(ValueError, match=r"of its 1 pairs 0 without a text and 1 without a summary, and none is left"):
        load_booksum(source, drop_empty=True)


def test_nothing_is_said_when_every_pair_is_whole(tmp_path, streaming, caplog):
    assert list(load_booksum(write_lines(tmp_path / "books.jsonl", BOOKS), streaming=streaming, drop_empty=True))
    assert not caplog.records


def test_the_hub_is_asked_for_the_configuration_that_holds_the_level(monkeypatch):
    asked = []

    def load_dataset(target, **options):
        asked.append((target, options["name"], options["streaming"]))
        return {"test": pairs_of(BOOKS, options["streaming"])}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    books = "ubaada/booksum-complete-cleaned"
    load_booksum(split="test")
    load_booksum(split="test", level="chapters")
    assert list(load_booksum(books, split="test")) == BOOK_PAIRS
    load_booksum(books, split="test", level="chapters", streaming=True)
    load_booksum("owner/books", split="test", level="long")
    assert asked == [
        ("kmfoda/booksum", None, False),
        ("kmfoda/booksum", None, False),
        (books, "books", False),
        (books, "chapters", True),
        ("owner/books", "long", False),
    ]
    with pytest.raises(
        ValueError, match=f"level='books': kmfoda/booksum has 'chapters'; for books use source='{books}'"
    ):
        load_booksum(level="books")
    with pytest.raises(ValueError, match=r"level='verses': ubaada/.* has 'books', 'chapters'$"):
        load_booksum(books, level="verses")


def test_other_fields_and_options_are_refused(tmp_path, streaming):
    good = write_lines(tmp_path / "good.jsonl", BOOKS)
    other = write_lines(tmp_path / "other.jsonl", [{"article": "a", "summary": "b"}])
    untold = write_lines(tmp_path / "untold.jsonl", [{"title": "a", "text": "b"}])
    broken = write_lines(tmp_path / "broken.jsonl", [{"bid": 4, "chapter": "T", "summary": "{'summary': 1}"}])
    number = write_lines(tmp_path / "number.jsonl", [{"bid": 4, "chapter": 7, "summary": "S"}])
    for source, options, message in (
        (other, {}, r"has the columns \['article', 'summary'\]: pairs need chapter and summary_text"),
        (untold, {}, r"has the columns \['title', 'text'\]: pairs need chapter and summary_text"),
        (broken, {}, "4: its summary is not JSON"),
        (number, {}, "4: '7': a text or a summary is a string"),
        (good, {"summaries": "best"}, "summaries='best': must be one of 'all', 'longest'"),
        (good, {"limit": 0}, "limit=0"),
        (good, {"split": "test"}, "split='test'"),
        (good, {"level": "books"}, "configuration 'books': .* plain files"),
    ):
        with pytest.raises(ValueError, match=message):
            list(load_booksum(source, streaming=streaming, **options))


# Rows.


def test_a_row_is_the_prompt_the_summary_and_eos_with_the_prompt_masked(tokenizer, streaming):
    rows = summarization_rows(pairs_of(BOOK_PAIRS, streaming), tokenizer)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    assert set(rows.column_names) == {"id", "input_ids", "labels", "document", "part"}
    rows = list(rows)
    assert [(row["id"], row["document"], row["part"]) for row in rows] == [
        (pair["id"], number, 0) for number, pair in enumerate(BOOK_PAIRS)
    ]
    for row, pair in zip(rows, BOOK_PAIRS, strict=True):
        prompt = summarization_prompt(pair["text"], tokenizer)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1
        assert row["input_ids"].index(tokenizer.eos_token_id) == len(row["input_ids"]) - 1
        assert tokenizer.decode(prompt[1:]) == DEFAULT_PROMPT.replace("{text}", pair["text"])
        assert tokenizer.decode(row["input_ids"][len(prompt) : -1]) == pair["summary"]


@pytest.mark.parametrize("prompt", ["{text}", "{text}\nTL;DR:", "Text: {text}", "{a} {{text}} {b}"])
@pytest.mark.parametrize("longest", [None, 1, 30, 10_000])
def test_any_prompt_with_a_place_for_the_text_is_the_prefix_of_its_row(tokenizer, prompt, longest):
    (row,) = summarization_rows(pairs_of(BOOK_PAIRS[:1]), tokenizer, prompt, max_text_tokens=longest)
    asked = summarization_prompt(PROSE * 5, tokenizer, prompt, max_text_tokens=longest)
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"].count(-100) == len(asked)
    text = tokenizer(PROSE * 5, add_special_tokens=False)["input_ids"][:longest]
    before, after = prompt.split("{text}")
    assert tokenizer.decode(asked[1:]) == before + tokenizer.decode(text) + after


def test_a_tokenizer_without_bos_begins_with_the_prompt(tokenizer):
    other = train_tokenizer([PROSE], vocab_size=300)
    other.bos_token = None
    assert other.decode(summarization_prompt("12 years", other, "{text}!")) == "12 years!"
    (row,) = summarization_rows(pairs_of(BOOK_PAIRS[2:]), other, "{text}!")
    assert other.decode(row["input_ids"]) == f"{PROSE * 4}!A lane.{other.eos_token}"


def test_what_is_cut_is_counted_in_one_warning(tokenizer, streaming, caplog):
    lengths = [len(tokenizer(pair["text"], add_special_tokens=False)["input_ids"]) for pair in BOOK_PAIRS]
    assert lengths[0] == lengths[1] > lengths[2]
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        rows = list(
            summarization_rows(
                pairs_of(BOOK_PAIRS, streaming), tokenizer, max_text_tokens=lengths[2], max_summary_tokens=9
            )
        )
    assert len(caplog.records) == 1
    if streaming:
        assert "pair '1:The House:sparknotes' is cut (max_text_tokens=" in caplog.text
    else:
        assert f"of 3 pairs, 2 texts are cut to max_text_tokens={lengths[2]} and 1 summaries to" in caplog.text
    summaries = [[label for label in row["labels"] if label != -100] for row in rows]
    assert [len(summary) for summary in summaries][1] == 9
    # A summary that was cut does not end where it was cut.
    assert [summary[-1] == tokenizer.eos_token_id for summary in summaries] == [True, False, True]
    assert len({row["labels"].count(-100) for row in rows}) == 1


def test_nothing_is_said_when_nothing_is_cut(tokenizer, streaming, caplog):
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        list(summarization_rows(pairs_of(BOOK_PAIRS, streaming), tokenizer, max_text_tokens=10_000))
    assert not caplog.records


def test_rows_are_collated_as_they_are(tokenizer):
    rows = list(summarization_rows(pairs_of(BOOK_PAIRS), tokenizer))
    batch = InfiniCollator(tokenizer)(rows)
    assert batch["document"].tolist() == [0, 1, 2]
    for index, row in enumerate(rows):
        learnt = batch["labels"][index][batch["labels"][index] != -100]
        assert learnt.tolist() == [label for label in row["labels"] if label != -100]


@pytest.mark.parametrize("column", ["text", "summary"])
@pytest.mark.parametrize("nothing", ["", " \n", None])
def test_an_empty_text_or_summary_is_named(tokenizer, streaming, column, nothing):
    pairs = pairs_of([BOOK_PAIRS[0], {**BOOK_PAIRS[2], column: nothing}], streaming)
    with pytest.raises(
        ValueError, match=rf"pair '2:The Lane:wiki': its {column} is empty; load_booksum\(\.\.\., drop"
    ):
        list(summarization_rows(pairs, tokenizer))


def test_rows_that_cannot_be_made_are_refused_before_any_is_read(tokenizer, streaming):
    pairs = pairs_of(BOOK_PAIRS, streaming)
    endless = train_tokenizer([PROSE], vocab_size=300)
    endless.eos_token = None
    for arguments, kind, message in (
        ((tokenizer, "Summarise."), ValueError, r"prompt='Summarise.': must hold \{text\} once"),
        ((tokenizer, "{text} {text}"), ValueError, r"must hold \{text\} once"),
        ((tokenizer, DEFAULT_PROMPT, 0), ValueError, "max_text_tokens=0: must be at least 1"),
        ((tokenizer, DEFAULT_PROMPT, None, 0), ValueError, "max_summary_tokens=0: must be at least 1"),
        ((endless,), ValueError, "no EOS to end a summary with: set tokenizer.eos_token"),
        (("gpt2",), TypeError, "tokenizer is a str"),
    ):
        with pytest.raises(kind, match=message):
            summarization_rows(pairs, *arguments)
    with pytest.raises(ValueError, match="must hold"):
        summarization_prompt("text", tokenizer, "Summarise.")


# The pairs of the corpus, and of the hub.


@pytest.mark.skipif(not CORPUS.exists(), reason="the corpus is not here")
def test_the_pairs_of_the_corpus_become_rows(tokenizer):
    sizes = {}
    for split in ("train", "validation", "test"):
        pairs = load_booksum(CORPUS, split=split)
        stored = [json.loads(line) for line in (CORPUS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert pairs["text"][:] == [row["chapter"] for row in stored]
        assert pairs["summary"][:] == [row["summary_text"] for row in stored]
        sizes[split] = len(set(pairs["id"]))
    assert sizes == {"train": 35, "validation": 6, "test": 7}
    (row,) = summarization_rows(load_booksum(CORPUS, split="test", limit=1), tokenizer)
    asked = summarization_prompt(pairs[0]["text"], tokenizer)
    assert row["input_ids"][: len(asked)] == asked


@pytest.mark.hub
@pytest.mark.parametrize("source", ["kmfoda/booksum", "ubaada/booksum-complete-cleaned"])
def test_booksum_streams_pairs_from_the_hub(source, tokenizer):
    pairs = load_booksum(source, split="validation", streaming=True, limit=3)
    rows = list(summarization_rows(pairs, tokenizer))
    assert len({row["id"] for row in rows}) == 3
    assert all(len(row["input_ids"]) > 1000 for row in rows)
