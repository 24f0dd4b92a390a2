"""Parts of local folders: what is measured on was held out, and a text is whole wherever it lies."""

import json
from pathlib import Path

import pytest

from infini_hf.cli.script_arguments import DocumentArguments
from infini_hf.data.documents import load_documents
from infini_hf.data.local_parts import held_out_split

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(folder, *names):
    """Files of one document each, which says where it is from and has lines."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text, suffix = f"{name}\n\nends", Path(name).suffix
        rows = {".jsonl": json.dumps({"text": text}) + "\n", ".csv": f'text\n"{text}"\n', ".txt": text}
        path.write_text(rows.get(suffix, json.dumps([{"text": text}])), encoding="utf-8")
    return folder


def read(folder, split):
    return [row["text"].removesuffix("\n\nends") for row in load_documents(folder, split)]


@pytest.mark.parametrize(
    ("names", "split", "held_out"),
    [
        (["train.jsonl", "val.jsonl"], "validation", ["val.jsonl"]),
        (["train.jsonl", "dev.jsonl", "test.jsonl"], "validation", ["dev.jsonl"]),
        (["train/a.jsonl", "val/a.jsonl"], "validation", ["val/a.jsonl"]),
        (["books-train-1.jsonl", "books-dev-1.jsonl"], "validation", ["books-dev-1.jsonl"]),
        (["my_train.jsonl", "my_validation.jsonl"], "validation", ["my_validation.jsonl"]),
        (["data/train.jsonl", "data/validation.jsonl"], "validation", ["data/validation.jsonl"]),
        (["train.json", "validation.json"], "validation", ["validation.json"]),
        (["train.csv", "validation.csv"], "validation", ["validation.csv"]),
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["validation.jsonl"], "validation", ["validation.jsonl"]),
        (["train/a.txt", "val/b.txt", "val/a.txt"], "validation", ["val/a.txt", "val/b.txt"]),
        (["data/train/a.txt", "data/val/a.txt"], "validation", ["data/val/a.txt"]),
        (["train/x/a.txt", "dev/x/a.txt"], "validation", ["dev/x/a.txt"]),
        (["train/a.txt", "test/a.txt"], "test", ["test/a.txt"]),
        (["train.txt", "val.txt", "README.txt"], "validation", ["val.txt"]),
        (["a.txt", "b.txt", "dev/c.txt"], "validation", ["dev/c.txt"]),
        # No part is named, whatever words are in the titles of books.
        (["a.txt", "murder on a train.txt", "the test of time.txt"], "train", None),
        (["a/x.txt", "b/y.txt"], "train", None),
        (["a.jsonl", "b.jsonl"], "train", None),
    ],
    ids=str,
)
def test_what_is_measured_on_is_the_part_that_was_held_out(tmp_path, names, split, held_out):
    folder = write(tmp_path, *names)
    assert held_out_split(folder) == split
    assert read(folder, split) == (sorted(names) if held_out is None else held_out)


def test_the_part_to_train_on_leaves_out_what_is_held_out(tmp_path):
    assert read(write(tmp_path / "a", "train.txt", "val.txt", "README.txt"), "train") == ["train.txt"]
    assert read(write(tmp_path / "b", "a.txt", "b.txt", "dev/c.txt"), "train") == ["a.txt", "b.txt"]
    assert read(write(tmp_path / "c", "train/x/b.txt", "train/y/a.txt", "dev/c.txt"), "train") == [
        "train/x/b.txt",
        "train/y/a.txt",
    ]
    assert read(write(tmp_path / "d", "data/train/a.txt", "data/val/a.txt"), "train") == ["data/train/a.txt"]


def test_a_folder_whose_name_is_a_pattern_has_parts_too(tmp_path):
    folder = write(tmp_path / "bo[ok]s *", "train/a.txt", "val/a.txt")
    assert held_out_split(folder) == "validation"
    assert read(folder, "validation") == ["val/a.txt"]


@pytest.mark.parametrize("name", ["train.jsonl", "train/a.txt", "data/train/a.jsonl", "books-train-1.csv"])
def test_a_folder_that_holds_nothing_out_is_refused(tmp_path, name):
    folder = write(tmp_path, name)
    with pytest.raises(ValueError, match=r"source='.*': has 'train', and nothing that is held out; name a file or"):
        held_out_split(folder)
    with pytest.raises(ValueError, match="nothing that is held out"):
        DocumentArguments(train_source=str(folder), eval_source=str(folder)).check_sources()
    assert read(folder, "train") == [name]


def test_a_part_that_is_not_there_is_refused(tmp_path):
    for folder in (write(tmp_path / "a", "train/a.txt", "dev/a.txt"), write(tmp_path / "b", "train.txt", "dev.txt")):
        with pytest.raises(ValueError, match=r"split='test': .* has 'train', 'validation'; name one of them"):
            load_documents(folder, "test")


def test_a_folder_without_anything_to_read_is_left_to_whoever_reads_it(tmp_path):
    assert held_out_split(tmp_path) == "train"
    with pytest.raises(ValueError, match="holds nothing to read"):
        load_documents(tmp_path, held_out_split(tmp_path))
