"""Collating: rows of any length come out of a batch as they went in, and a row that cannot is named."""

import logging

import numpy as np
import pytest
import torch

from infini_hf.data.base_rows import train_tokenizer
from infini_hf.data.collator import InfiniCollator

PROSE = "The old house stood at the end of the lane, and nobody had lived there for 12 years. "


@pytest.fixture
def trained():
    return train_tokenizer([PROSE], vocab_size=300)


def row_of(length, **columns):
    ids = list(range(5, 5 + length))
    return {"input_ids": ids, "labels": ids, "document": 3, "part": 1, **columns}


def test_a_batch_is_padded_on_the_right_and_can_be_read_back(trained):
    assert trained.padding_side == "left"
    rows = [row_of(9, document=4, part=0), row_of(3, document=2**40), row_of(1, labels=[-100])]
    batch = InfiniCollator(trained)(rows)
    assert set(batch) == {"input_ids", "labels", "attention_mask", "document", "part"}
    assert all(values.dtype == torch.int64 for values in batch.values())
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, 9)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][index].tolist() == row["input_ids"] + [trained.pad_token_id] * (9 - length)
        assert batch["labels"][index].tolist() == row["labels"] + [-100] * (9 - length)
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (9 - length)
    assert batch["document"].tolist() == [4, 2**40, 3]
    assert batch["part"].tolist() == [0, 1, 1]


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (4, 8), (5, 5)])
def test_the_width_can_be_a_multiple(trained, multiple, width):
    batch = InfiniCollator(trained, pad_to_multiple_of=multiple)([row_of(5), row_of(2)])
    assert {tuple(batch[name].shape) for name in ("input_ids", "labels", "attention_mask")} == {(2, width)}
    assert batch["attention_mask"].sum() == 7


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_arrays_and_tensors_are_collated_like_lists(trained, kind):
    rows = [row_of(5), row_of(2)]
    others = [{**row, "input_ids": kind(row["input_ids"]), "labels": kind(row["labels"])} for row in rows]
    expected, found = InfiniCollator(trained)(rows), InfiniCollator(trained)(others)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_mask_of_the_row_itself_is_kept_and_other_columns_are_not(trained):
    batch = InfiniCollator(trained)([row_of(3, attention_mask=[0, 1, 1], id="x", starts=[0]), row_of(4)])
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]]
    assert set(batch) == {"input_ids", "labels", "attention_mask", "document", "part"}


def test_documents_are_named_only_where_every_row_has_one(trained):
    other = {name: values for name, values in row_of(3).items() if name != "document"}
    assert set(InfiniCollator(trained)([row_of(3), other])) == {"input_ids", "labels", "attention_mask", "part"}


def test_the_padding_token_falls_back_to_eos(trained):
    assert trained.pad_token_id != trained.eos_token_id
    trained.pad_token = None
    batch = InfiniCollator(trained)([row_of(3), row_of(2)])
    assert batch["input_ids"][1, 2] == trained.eos_token_id
    trained.eos_token = None
    with pytest.raises(ValueError, match=r"neither a padding token nor EOS: set tokenizer\.pad_token"):
        InfiniCollator(trained)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"labels": None},
            r"row 1 of the batch \(document 3\) has no labels: add labels \(for language modelling: the",
        ),
        ({"input_ids": None}, r"row 1 of the batch \(document 3\) has no input_ids: tokenise it"),
        ({"labels": [1, 2]}, r"row 1 of the batch \(document 3\) has 2 labels for 3 input_ids"),
        ({"attention_mask": [1]}, "has 1 attention_mask for 3 input_ids"),
        ({"input_ids": [], "labels": []}, r"row 1 of the batch \(document 3\) is empty: leave it out"),
        ({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]}, r"input_ids of shape \(1, 3\) and torch.int64"),
        ({"labels": [1.0, 2.0, 3.0]}, r"labels of shape \(3,\) and torch.float32"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(trained, row, message):
    with pytest.raises(ValueError, match=message):
        InfiniCollator(trained)([row_of(3), row_of(3, **row)])


def test_a_row_that_names_no_document_is_named_by_its_place(trained):
    with pytest.raises(ValueError, match="row 0 of the batch has no labels"):
        InfiniCollator(trained)([{"input_ids": [1, 2, 3]}])


@pytest.mark.parametrize("multiple", [0, 2.5])
def test_an_impossible_multiple_is_refused(trained, multiple):
    with pytest.raises(ValueError, match=f"pad_to_multiple_of={multiple}"):
        InfiniCollator(trained, pad_to_multiple_of=multiple)


def test_a_batch_without_any_label_is_warned_of_once(trained, caplog):
    masked, seen = row_of(3, labels=[-100] * 3), row_of(3)
    collator = InfiniCollator(trained)
    with caplog.at_level(logging.WARNING, logger="infini_hf"):
        collator([masked, seen])
        assert not caplog.records
        # The first label of a row has nothing before it that could predict it.
        batch = collator([masked, row_of(3, labels=[7, -100, -100])])
        assert len(caplog.records) == 1
        collator([masked])
    assert batch["labels"].tolist() == [[-100] * 3, [7, -100, -100]]
    assert len(caplog.records) == 1
    assert "no label to learn from" in caplog.text


def test_a_row_without_weights_among_others_weighs_one_each(trained):
    rows = [row_of(3, loss_weights=[1.0, 5.0, 2.0]), row_of(2), row_of(1, loss_weights=None)]
    batch = InfiniCollator(trained)(rows)
    assert batch["loss_weights"].tolist() == [[1.0, 5.0, 2.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    assert "document" not in InfiniCollator(trained)([row_of(3), row_of(2, document=None)])


def test_a_row_without_sources_among_others_repeats_nothing(trained):
    rows = [row_of(3, sources=[-1, -1, 0]), row_of(2), row_of(1, sources=None)]
    assert InfiniCollator(trained)(rows)["sources"].tolist() == [[-1, -1, 0], [-1, -1, -1], [-1, -1, -1]]
    assert "sources" not in InfiniCollator(trained)([row_of(3)])


@pytest.mark.parametrize(
    ("sources", "wrong"), [([-1, 0, 9], "9 for token 2"), ([-1, -2, 0], "-2"), ([0, 0, 0], "0 for")]
)
def test_a_source_that_is_no_earlier_token_is_named(trained, sources, wrong):
    with pytest.raises(ValueError, match=rf"row 0 .* has the source {wrong}.*: a source is the column of an earlier"):
        InfiniCollator(trained)([row_of(3, sources=sources)])
    assert InfiniCollator(trained)([row_of(3, sources=[-1, 0, 0])])["sources"].tolist() == [[-1, 0, 0]]
