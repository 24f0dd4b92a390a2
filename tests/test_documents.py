"""Documents from files and from the hub: all of them, whole, in order; what is not there is named."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import infini_hf
from infini_hf.data.documents import columns_of, load_documents, open_rows

datasets = pytest.importorskip("datasets")

NOVELS = Path(__file__).parents[2] / "shared" / "corpus" / "novels"
TEXTS = {"b.txt": "Second.\r\n\r\nIts end.\n", "a.txt": "First, é.", "c.txt": "  Third\n"}
PAPERS = [{"body": f"Proof {n}.", "field": "math" if n % 2 else "physics", "meta": {"arxiv": n}} for n in range(7)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=[True, False], ids=["stream", "table"])
def streaming(request):
    return request.param


@pytest.fixture
def books(tmp_path):
    """A folder whose name would be a pattern, with files written out of order and one that is no text."""
    folder = tmp_path / "bo[ok]s *"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_bytes(text.encode())
    (folder / "notes.md").write_text("not a book")
    return folder


@pytest.fixture
def papers(tmp_path):
    return write_lines(tmp_path / "papers.jsonl", PAPERS)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(documents):
    return [row["text"] for row in documents]


# What is loaded.


def test_a_folder_is_read_in_name_order_one_document_a_file(books, streaming):
    documents = load_documents(books, streaming=streaming)
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    assert isinstance(documents, kind)
    assert documents.column_names == ["text"]
    assert list(documents) == [{"text": text} for text in ("First, é.", "Second.\n\nIts end.\n", "  Third\n")]
    assert texts(load_documents(str(books / "b.txt"), streaming=streaming)) == ["Second.\n\nIts end.\n"]


def test_lines_and_tables_are_read_in_their_order_with_any_text_column(papers, tmp_path, streaming):
    # A name that would be a pattern.
    datasets.Dataset.from_list(PAPERS).to_parquet(tmp_path / "p[aper]s.parquet")
    for source in (papers, tmp_path / "p[aper]s.parquet"):
        documents = load_documents(source, text_column="body", streaming=streaming)
        assert texts(documents) == [paper["body"] for paper in PAPERS]
        assert [set(row) for row in documents] == [{"text"}] * 7


def test_a_text_column_takes_the_place_of_one_named_text(tmp_path, streaming):
    source = write_lines(tmp_path / "rows.jsonl", [{"text": "abstract", "body": "whole"}])
    assert list(load_documents(source, text_column="body", streaming=streaming)) == [{"text": "whole"}]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (lambda row: row["meta"]["arxiv"] > 4, [5, 6]),
        ("field=math", [1, 3, 5]),
        (" field = math ", [1, 3, 5]),
        ("field~phys", [0, 2, 4, 6]),
        ("body~f 3.", [3]),
        ("body=Proof", []),
    ],
)
def test_a_filter_is_a_function_or_a_condition_on_a_column(papers, streaming, where, kept):
    # An empty table is refused where it is made; a stream cannot know.
    if not kept and not streaming:
        with pytest.raises(ValueError, match=r"body=Proof.*keep none of its rows"):
            load_documents(papers, text_column="body", where=where, streaming=streaming)
        return
    documents = load_documents(papers, text_column="body", where=where, streaming=streaming)
    assert texts(documents) == [PAPERS[n]["body"] for n in kept]


def test_files_of_text_can_be_chosen_by_name(books, streaming):
    documents = load_documents(books, where=lambda row: not row["file"].endswith("b.txt"), streaming=streaming)
    assert texts(documents) == ["First, é.", "  Third\n"]


def test_a_limit_counts_the_documents_that_are_kept(papers, streaming):
    def load(**options):
        return texts(load_documents(papers, text_column="body", streaming=streaming, **options))

    assert load(limit=2) == ["Proof 0.", "Proof 1."]
    assert load(limit=2, where="field=math") == ["Proof 1.", "Proof 3."]
    assert len(load(limit=100)) == 7


def test_a_stream_reads_no_more_than_it_is_asked_for(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    documents = iter(load_documents(tmp_path))
    (tmp_path / "c.txt").unlink()
    assert [next(documents)["text"] for _ in range(2)] == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        next(documents)


def test_an_edited_file_is_read_again(books):
    load_documents(books, streaming=False)
    (books / "a.txt").write_text("Another.")
    assert texts(load_documents(books, streaming=False))[0] == "Another."


@pytest.mark.parametrize("layout", ["folders of texts", "files of lines"])
def test_a_folder_of_splits_is_read_by_split(tmp_path, streaming, layout):
    for split in ("train", "validation"):
        if layout == "files of lines":
            write_lines(tmp_path / f"{split}.jsonl", [{"text": f"{split}\n\nends"}])
        else:
            (tmp_path / split).mkdir()
            (tmp_path / split / "book.txt").write_text(f"{split}\n\nends")
    for split in ("train", "validation"):
        assert texts(load_documents(tmp_path, split=split, streaming=streaming)) == [f"{split}\n\nends"]


def test_a_stream_resumes_at_the_next_document(books, papers):
    for source, column in ((books, "text"), (papers, "body")):

        def load(source=source, column=column):
            return load_documents(source, text_column=column, where=lambda row: True, limit=5)

        whole = texts(load())
        for taken in range(len(whole)):
            documents, resumed = load(), load()
            before = texts(itertools.islice(documents, taken))
            resumed.load_state_dict(documents.state_dict())
            assert before + texts(resumed) == whole


@pytest.mark.skipif(not NOVELS.exists(), reason="the corpus is not here")
def test_novels_of_the_corpus_are_whole_and_in_order():
    files = sorted((NOVELS / "validation").glob("*.txt"))
    novels = texts(load_documents(NOVELS, split="validation", limit=3))
    assert novels == [file.read_text(encoding="utf-8") for file in files[:3]]


# What is refused.


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_document_is_named_or_dropped(books, papers, streaming, text):
    (books / "b.txt").write_text(text)
    with pytest.raises(ValueError, match=r"b\.txt: an empty document; pass drop_empty=True"):
        list(load_documents(books, streaming=streaming))
    kept = ["First, é.", "  Third\n"]
    assert texts(load_documents(books, streaming=streaming, drop_empty=True)) == kept
    assert texts(load_documents(books, streaming=streaming, where=lambda row: row["text"].strip())) == kept
    assert texts(load_documents(books, streaming=streaming, limit=1)) == kept[:1]
    lines = write_lines(papers, [*PAPERS[:3], {**PAPERS[3], "body": text}, {**PAPERS[4], "body": None}])
    with pytest.raises(ValueError, match="row 3: an empty document"):
        list(load_documents(lines, text_column="body", streaming=streaming))
    assert len(texts(load_documents(lines, text_column="body", streaming=streaming, drop_empty=True))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "text_column: there is no column 'text'; the source has 'body', 'field', 'meta'"),
        (
            {"text_column": "body", "where": "subject=math"},
            "where: there is no column 'subject'; the source has 'body'",
        ),
        ({"text_column": "body", "where": "math"}, "where='math': must be a function of a row, 'column=value'"),
        ({"text_column": "body", "where": 3}, "where=3: must be a function"),
        ({"split": "validation"}, "split='validation': .*papers.jsonl' has 'train'; name one of them"),
        ({"name": "books"}, "configuration 'books': .* plain files"),
        ({"limit": 0}, "limit=0: must be at least 1"),
        ({"limit": 1.5}, "limit=1.5: must be a whole number"),
    ],
)
def test_a_wrong_option_is_named_with_the_way_out(papers, streaming, options, message):
    with pytest.raises(ValueError, match=message):
        load_documents(papers, streaming=streaming, **options)


def test_a_column_that_is_not_text_is_named(papers, streaming):
    with pytest.raises(TypeError, match=r"row 0: column 'meta' holds dict.*\['body', 'field', 'meta'\]"):
        list(load_documents(papers, text_column="meta", streaming=streaming))


@pytest.mark.parametrize("source", ["books", "./no/such", "no/such.txt", "a/b/c", "/no/such/folder", "pg91"])
def test_a_source_that_is_neither_path_nor_name_is_refused(source):
    with pytest.raises(ValueError, match=f"source='{source}': there is no such file or folder.*'owner/name'.*'pg19'"):
        load_documents(source)


def test_a_source_without_text_is_refused(tmp_path, books, streaming):
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("text\nwords\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, message in (
        ("empty", "empty': holds nothing to read; name a folder of .txt files"),
        ("table.csv", r"table.csv': a file must be .txt, .jsonl or .parquet"),
        ("latin.txt", r"latin.txt: is not UTF-8 text"),
    ):
        with pytest.raises(ValueError, match=message):
            list(load_documents(tmp_path / name, streaming=streaming))
    with pytest.raises(ValueError, match=r"split='test': the text of .* is all 'train'; name the file or folder"):
        load_documents(books, split="test", streaming=streaming)
    with pytest.raises(TypeError, match="source is a list: pass a path"):
        load_documents([books])


def test_a_source_without_rows_is_refused(tmp_path, streaming):
    with pytest.raises(ValueError, match=r"none.jsonl': holds no row"):
        load_documents(write_lines(tmp_path / "none.jsonl", []), streaming=streaming)
    with pytest.raises(ValueError, match=r"source='owner/name': holds no row"):
        columns_of(datasets.IterableDataset.from_generator(lambda: iter(())), "owner/name")


# The hub.


@pytest.mark.skipif(os.environ["HF_HUB_OFFLINE"] != "1", reason="the hub can be asked")
@pytest.mark.parametrize("source", ["pg19", "owner/name"])
def test_a_hub_that_cannot_be_asked_is_told_from_a_missing_file(source):
    with pytest.raises(ConnectionError, match=f"source='{source}': no such file or folder, and no hub to ask"):
        load_documents(source)


def test_a_short_name_stands_for_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return {"train": datasets.Dataset.from_dict({"text": ["A book."], "url": ["u"]}).to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(load_documents("pg19")) == ["A book."]
    assert texts(load_documents("owner/papers", name="math")) == ["A book."]
    assert asked == [
        (("emozilla/pg19",), {"streaming": True, "name": None}),
        (("owner/papers",), {"streaming": True, "name": "math"}),
    ]
    with pytest.raises(ValueError, match="split='dev': 'pg19' has 'train'"):
        load_documents("pg19", split="dev")


@pytest.mark.hub
def test_pg19_streams_books_from_the_hub():
    (book,) = load_documents("pg19", split="test", limit=1)
    assert set(book) == {"text"}
    assert len(book["text"]) > 50_000
    with pytest.raises(ValueError, match="has 'train', 'validation', 'test'"):
        open_rows("pg19", split="dev")


@pytest.mark.slow
def test_data_modules_are_imported_without_datasets():
    code = (
        "import sys; sys.modules['datasets'] = None; "
        "import infini_hf.data.documents, infini_hf.data.packing, infini_hf.data.booksum, infini_hf.data.collator"
    )
    root = Path(infini_hf.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
