"""Rows in lane order: every row of a batch goes on with the document that its lane has read; streams read whole."""

from itertools import islice, pairwise

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from training import tiny_rows

from infini_hf.data.lane_order import LaneSampler, interleave, lane_stream
from infini_hf.data.whole_stream import WholeStream, filled_stream, whole_stream

UNEVEN = [(document, part) for document, parts in enumerate((5, 1, 3, 2, 7, 1, 1)) for part in range(parts)]


def sampled(epoch=0, lanes=3, seed=0, rows=UNEVEN, **options):
    """Batches of `(document, part)` in the order of a sampler."""
    sampler = LaneSampler(*zip(*rows, strict=True), lanes, seed, **options)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    return [[rows[index] for index in indices[start : start + lanes]] for start in range(0, len(indices), lanes)]


@pytest.mark.parametrize("lanes", [1, 2, 3, 7])
def test_every_row_continues_the_batch_before_or_begins_a_document(lanes):
    for epoch in range(5):
        batches = sampled(epoch, lanes)
        assert len(batches) == -(-len(UNEVEN) // lanes)
        assert all(part == 0 for _, part in batches[0])
        for before, after in pairwise(batches):
            for (document, part), (last, last_part) in zip(after, before, strict=True):
                assert part == 0 or (document, part) == (last, last_part + 1)


def test_a_lane_reads_whole_documents_until_the_epoch_ends():
    counts = {document: sum(d == document for d, _ in UNEVEN) for document, _ in UNEVEN}
    for lane in zip(*sampled(), strict=True):
        for (document, part), (_, following) in pairwise(lane):
            assert following or part + 1 == counts[document]


def test_one_lane_reads_every_row_once():
    assert sorted(row for batch in sampled(lanes=1) for row in batch) == sorted(UNEVEN)


def test_rows_may_be_stored_in_any_order():
    assert sampled(rows=UNEVEN[::-1], shuffle=False, lanes=1) == [
        [row] for row in sorted(UNEVEN, key=lambda r: (-r[0], r[1]))
    ]


def test_the_order_depends_on_seed_and_epoch_alone():
    assert sampled(2, seed=1) == sampled(2, seed=1)
    orders = {str(sampled(epoch, seed=seed)) for epoch in range(4) for seed in (0, 10)}
    assert len(orders) == 8
    assert sampled(0, shuffle=False) == sampled(3, shuffle=False)


@pytest.mark.parametrize(
    ("rows", "lanes", "message"),
    [
        ([(0, 0), (0, 2)], 1, r"document 0 has the parts \[0, 2\]: they must be 0, 1, 2"),
        ([(0, 0), (4, 1), (4, 1)], 1, r"document 4 has the parts \[1, 1\]"),
        ([(0, 0), (0, 1), (1, 0)], 3, r"2 documents for 3 lanes .* use a smaller batch"),
    ],
)
def test_rows_that_cannot_be_put_in_order_are_refused(rows, lanes, message):
    with pytest.raises(ValueError, match=message):
        LaneSampler(*zip(*rows, strict=True), lanes)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_stream_is_interleaved_until_a_lane_runs_dry(lanes):
    rows = tiny_rows(documents=7)
    ordered = list(interleave(iter(rows), lanes))
    assert len(ordered) % lanes == 0
    assert len(ordered) > len(rows) - 3 * lanes
    lanes_read = [ordered[lane::lanes] for lane in range(lanes)]
    for lane in lanes_read:
        for before, after in pairwise(lane):
            follows = (after["document"], after["part"]) == (before["document"], before["part"] + 1)
            assert follows or after["part"] == 0
    if lanes == 1:
        assert ordered == rows


def test_a_stream_of_too_few_documents_is_refused_before_its_first_row():
    with pytest.raises(ValueError, match=r"3 documents for 4 lanes .* use a smaller batch"):
        next(interleave(iter(tiny_rows(documents=3)), 4))


def test_rows_that_no_epoch_reads_are_counted(caplog):
    """Four documents in four lanes: what lies beyond the mean of their lengths is read by none."""
    lengths = (10, 20, 30, 100)
    rows = [(document, part) for document, length in enumerate(lengths) for part in range(length)]
    LaneSampler(*zip(*rows, strict=True), 4)
    assert "60 of 160 rows are left out of an epoch" in caplog.text
    caplog.clear()
    LaneSampler(*zip(*rows, strict=True), 1)
    assert not caplog.text


def test_a_stream_is_read_no_further_than_needed():
    def endless():
        document = 0
        while True:
            yield from ({"document": document, "part": part} for part in range(2))
            document += 1

    read_so_far = [(row["document"], row["part"]) for row in islice(interleave(endless(), 2), 6)]
    assert read_so_far == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0)]


def test_a_streamed_dataset_becomes_one_in_lane_order():
    rows = tiny_rows(documents=5)
    stream = lane_stream(Dataset.from_list(rows).to_iterable_dataset(), 2)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(interleave(iter(rows), 2))
    assert list(stream) == list(stream)


class PlainStream(torch.utils.data.IterableDataset):
    """Five rows of torch alone, without epochs."""

    def __iter__(self):
        yield from ({"input_ids": [n], "labels": [n]} for n in range(5))


def test_a_stream_of_torch_alone_is_filled_with_rows_that_count_for_nothing():
    shards = [
        prepare_data_loader(
            DataLoader(filled_stream(PlainStream(), 2, 4), batch_size=2, collate_fn=list),
            num_processes=2,
            process_index=process,
            put_on_device=False,
            dispatch_batches=False,
        )
        for process in range(2)
    ]
    rows = [row for shard in shards for batch in shard for row in batch]
    assert sorted(row["labels"][0] for row in rows) == [-100, -100, -100, 0, 1, 2, 3, 4]
    assert filled_stream(PlainStream(), 1, 4).__class__ is PlainStream


def test_a_whole_stream_is_shuffled_with_the_one_it_holds():
    def stream():
        return (
            Dataset.from_dict({"text": [str(number) for number in range(12)]}).to_iterable_dataset(3).shuffle(seed=0)
        )

    held = stream()
    assert whole_stream(held, 1) is whole_stream(held, 4) is held
    orders = []
    for epoch in range(2):
        whole, expected = whole_stream(stream(), 2), stream()
        for dataset in (whole, expected):
            dataset.set_epoch(epoch)
        orders.append([row["text"] for row in whole])
        assert isinstance(whole, WholeStream)
        assert orders[-1] == [row["text"] for row in expected]
    assert orders[0] != orders[1]
